"""Samplers: prompts in, the same prompts with K completions and their log-probabilities out."""
