"""`fastrlhf plan`: the memory that a run will take, from its recipe and its models' configurations alone."""
