"""What a reward model learns from a judgement: given scores as people meant them, losses, the start of its head.

    raters.py -> losses.py -> link.py      head.py

The raw output is one scale for all of it, that of Bradley-Terry: a difference of 1 is e : 1. PPO and transformers read
the raw output.
"""
