"""Evidence: records in, numbers with intervals out. No model is needed and nothing is sampled here.

`statistics` (bootstrap over prompts) · `tables` (records → arrays per prompt) · `frontier` (reward against KL) ·
`winrate` · `best_of_n` · `comparison` (methods at equal KL) · `optimum` (the best any policy could do) ·
`density_ratio` (what a policy made of π_sft's own samples) · `schema` and `density_schema` (what
`evaluation/evidence.json` holds) · `run_folder` (where a run keeps things) · `evidence` (all of it together).
"""
