"""Evidence: records in, numbers with intervals out. No model is needed and nothing is sampled here.

`statistics` (bootstrap over prompts) · `sample_table` (records → arrays per prompt) · `frontier` (reward against KL,
win rates, methods at equal KL) · `pool` (the best any policy could do, best of N, density ratios) · `verdict` (what to
ship) · `schema` (what `evaluation/evidence.json` holds) · `run_folder` (where a run keeps things) · `evidence` (all).
"""
