"""The generator of the quickstart's shipped data; nothing of it is imported at run time."""
