"""Samplers and scorers: prompts in, records with K completions, log q and rewards out."""
