"""Alignment where everything can be summed: the theory's claims as numbers.

`alignment` lists every completion of a tiny language, and has the objective, its optimum and its gradients in closed
form; `convergence` measures how the K-sample gradients of `exalign.objectives` approach them (Theorems 3.2
and 3.3); `bimodal` minimises each divergence against a target the policy cannot reach (Figures 1 and 5).
"""
