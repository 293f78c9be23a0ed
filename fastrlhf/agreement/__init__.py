"""How far a reward model agrees with people, and whether that is more than the words of a reply or its length tell.

    pairs.py bootstrap.py -> people.py baselines.py -> figures.py -> words.py

`fastrlhf reward-eval` prints it of any rows, and reward training of its held-out rows.
"""
