"""Alignment where everything can be summed: the theory's claims as numbers.

`world` lists every completion of a tiny language; `alignment` has the objective, its optimum and its gradients in
closed form; `convergence` measures how the K-sample gradients of `exalign.objectives` approach them (Theorems 3.2
and 3.3); `bimodal` minimises each divergence against a target the policy cannot reach (Figure 1); `figures_data`
collects what figures need.
"""

from exalign.exact.alignment import AlignmentProblem, kl, log_partition, optimal_policy
from exalign.exact.convergence import GradientErrors, Slope, gradient_errors
from exalign.exact.figures_data import (
    GradientErrorFigure,
    ObjectiveFigure,
    TwoModeFigure,
    gradient_error_figure,
    objective_figure,
    on_policy_figure,
    two_mode_figure,
)
from exalign.exact.world import World

__all__ = [
    "AlignmentProblem",
    "GradientErrorFigure",
    "GradientErrors",
    "ObjectiveFigure",
    "Slope",
    "TwoModeFigure",
    "World",
    "gradient_error_figure",
    "gradient_errors",
    "kl",
    "log_partition",
    "objective_figure",
    "on_policy_figure",
    "optimal_policy",
    "two_mode_figure",
]
