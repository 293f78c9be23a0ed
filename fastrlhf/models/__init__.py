"""transformers models: loaded, read, adapted, saved."""
