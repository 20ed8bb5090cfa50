"""Evidence: records in, numbers with intervals out. No model is needed and nothing is sampled here.

`statistics` (bootstrap over prompts) · `tables` (records → arrays per prompt) · `frontier` (reward against KL) ·
`winrate` · `comparison` (methods at equal KL) · `optimum` (the best any policy could do) · `schema` (what
`evaluation/evidence.json` holds) · `run_folder` (where a run keeps things) · `evidence` (all of it together).
"""
