"""Figures of the enumerable world: what each divergence makes of two modes, and how fast the theorems come true."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from exalign.report.style import LIGHT

_STYLES = [
    ("exo-1", "-", "o"),
    ("dpo-1", "--", "s"),
    ("other-1", "-.", "^"),
    ("other-2", ":", "v"),
    ("other-3", (0, (5, 1, 1, 1, 1, 1)), "P"),
]
"""In the order of the curves given: reverse KL (EXO) first, forward KL (DPO) second, then any others."""


def draw_divergences(
    outcomes: ArrayLike, target: ArrayLike, policies: Mapping[str, ArrayLike], *, width: float = 6.4
) -> Figure:
    """What minimising each divergence makes of a two-mode target when the policy can hold one mode (Figure 1).

    `outcomes` `[N]` are places on the horizontal axis, `target` `[N]` their probabilities, `policies` the fitted
    probabilities `[N]` by the name of the divergence, reverse KL first and forward KL second.
    """
    xs, probabilities = np.asarray(outcomes, dtype=float), np.asarray(target, dtype=float)
    figure = Figure(figsize=(width, 0.58 * width), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(xs, probabilities, color=LIGHT["muted"], alpha=0.25, linewidth=0, label="target π*")
    for (name, values), (color, dashes, _) in zip(policies.items(), _STYLES, strict=False):
        axes.plot(xs, np.asarray(values, dtype=float), color=LIGHT[color], linestyle=dashes, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("outcome")
    axes.set_ylabel("probability")
    axes.legend(loc="upper right")
    return figure


def draw_error_against_k(
    num_completions: ArrayLike, errors: Mapping[str, ArrayLike], *, slope: float, width: float = 6.4
) -> Figure:
    """Error of a gradient against K on log-log axes, with a line of the slope that theory gives (Theorems 3.2, 3.3).

    `num_completions` `[G]`; `errors` `[G]` by name, EXO first and DPO second. All must be above 0.
    """
    ks = np.asarray(num_completions, dtype=float)
    curves = {name: np.asarray(values, dtype=float) for name, values in errors.items()}
    if not curves or (ks <= 0).any() or any((values <= 0).any() for values in curves.values()):
        raise ValueError("log-log axes need at least one curve, and values above 0")
    figure = Figure(figsize=(width, 0.62 * width), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for (name, values), (color, dashes, marker) in zip(curves.items(), _STYLES, strict=False):
        axes.plot(ks, values, color=LIGHT[color], linestyle=dashes, marker=marker, label=name)
    top = max(values[0] for values in curves.values())
    guide = 1.6 * top * (ks / ks[0]) ** slope
    axes.plot(ks, guide, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (1, 2)), label=f"slope {slope:g}")
    axes.set_xticks(ks, [f"{k:g}" for k in ks])
    axes.minorticks_off()
    axes.set_xlabel("completions per prompt, K")
    axes.set_ylabel("relative error of the gradient")
    axes.legend(loc="lower left")
    return figure
