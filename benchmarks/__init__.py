"""Side by side with peers. Each is one command from the repository's root: `python -m benchmarks.step --help`.

`step`, `sample`, `score`, `memory`: exalign against TRL, transformers and the official code's way, on equal work whose
numbers are compared first. `sweep`: how exalign's cost grows. `profile`: where a step's time goes. `all` runs them all
into a folder, `tables` renders the folder into docs/performance.md. The peers need `pip install -e ".[benchmarks]"`.
"""
