"""Figures of the enumerable world: what each divergence makes of two modes, and how fast the theorems come true.

Plain arrays in, figures out; `svg.save_figure` writes them. Curves are drawn in the order given: reverse KL (EXO)
first, forward KL (DPO) second, then any others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import ArrayLike

from exalign.report.style import LIGHT, figure_style

_STYLES: list[dict[str, Any]] = [
    {"color": LIGHT["exo-1"], "linestyle": "-", "marker": "o"},
    {"color": LIGHT["dpo-1"], "linestyle": "--", "marker": "s"},
    {"color": LIGHT["other-1"], "linestyle": "-.", "marker": "^"},
    {"color": LIGHT["other-2"], "linestyle": (0, (1, 1.2)), "marker": "v"},
    {"color": LIGHT["other-3"], "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "P"},
    {"color": LIGHT["exo-3"], "linestyle": (0, (8, 2)), "marker": "H"},
]
_PANELS_IN_A_ROW = 3


@dataclass(frozen=True, eq=False)
class ErrorPanel:
    """One panel of errors against K: a title, the slope that theory gives, and per curve the errors `[S]`.

    `standard_errors` are those of the measured errors, by the same names, where known.
    """

    title: str
    slope: float
    errors: Mapping[str, ArrayLike]
    standard_errors: Mapping[str, ArrayLike] = field(default_factory=dict)


def draw_divergences(
    points: ArrayLike,
    target: ArrayLike,
    policies: Mapping[str, ArrayLike],
    *,
    reference: ArrayLike | None = None,
    width: float = 7.6,
) -> Figure:
    """What minimising each divergence makes of a two-mode target when the policy can hold one mode (Figure 1).

    One panel per divergence. `points` `[N]` lie on the horizontal axis; `target`, `reference` (π_sft) and each of
    `policies` are densities `[N]`.
    """
    _check_number(len(policies))
    xs, wanted = np.asarray(points, dtype=float), np.asarray(target, dtype=float)
    columns = min(len(policies), _PANELS_IN_A_ROW)
    rows = -(-len(policies) // columns)
    with figure_style():
        figure = Figure(figsize=(width, 0.5 + 1.9 * rows), layout="constrained")
        panels = [axes for row in figure.subplots(rows, columns, sharey=True, squeeze=False) for axes in row]
        for axes in panels[len(policies) :]:
            axes.remove()
        for axes, (name, density), style in zip(panels, policies.items(), _STYLES, strict=False):
            axes.fill_between(xs, wanted, color=LIGHT["muted"], alpha=0.3, linewidth=0, label="target π*")
            if reference is not None:
                values = np.asarray(reference, dtype=float)
                axes.plot(xs, values, color=LIGHT["muted"], linewidth=1.0, linestyle=(0, (1, 2)), label="π_sft")
            axes.plot(xs, np.asarray(density, dtype=float), **{**style, "marker": "", "linestyle": "-"}, label="policy")
            axes.set_title(name)
            axes.margins(x=0)
        panels[0].set_ylim(bottom=0)
        panels[0].legend(loc="upper right")
        figure.supxlabel("outcome", fontsize=9)
        figure.supylabel("density", fontsize=9)
    return figure


def draw_error_against_k(num_completions: ArrayLike, panels: Sequence[ErrorPanel], *, width: float = 7.6) -> Figure:
    """Errors of the K-sample gradient against K on log-log axes, each panel with its slope (Theorems 3.2, 3.3).

    `num_completions` `[S]`, above 0. An error that is not above 0 has no place on such axes and is left out; a curve
    without any other raises `ValueError`.
    """
    ks = np.asarray(num_completions, dtype=float)
    if not panels or (ks <= 0).any():
        raise ValueError("need at least one panel, and K above 0")
    with figure_style():
        figure = Figure(figsize=(width, 3.4), layout="constrained")
        for i, panel in enumerate(panels):
            _errors(figure.add_subplot(1, len(panels), i + 1), ks, panel)
        figure.axes[0].set_ylabel("error of the gradient")
    return figure


def _errors(axes: Axes, ks: np.ndarray, panel: ErrorPanel) -> None:
    _check_number(len(panel.errors))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    top = 0.0
    for (name, values), style in zip(panel.errors.items(), _STYLES, strict=False):
        errors = np.asarray(values, dtype=float)
        shown = errors > 0
        if not shown.any():
            raise ValueError(f"{panel.title}, {name}: no error is above 0")
        axes.plot(ks[shown], errors[shown], label=name, markersize=4, **style)
        top = max(top, float(errors[shown][0] * (ks[shown][0] / ks[0]) ** -panel.slope))
        if name in panel.standard_errors:
            spread = 1.96 * np.asarray(panel.standard_errors[name], dtype=float)[shown]
            # An arm that would reach 0 ends at a tenth of the error: log axes have no 0.
            low = np.maximum(errors[shown] - spread, errors[shown] / 10)
            axes.vlines(ks[shown], low, errors[shown] + spread, color=style["color"], linewidth=0.8, alpha=0.6)
    guide = 1.5 * top * (ks / ks[0]) ** panel.slope
    slope = f"{panel.slope:g}".replace("-", "−")
    axes.plot(ks, guide, color=LIGHT["muted"], linewidth=1.0, linestyle=(0, (1, 2)), label=f"slope {slope}")
    axes.set_xticks(ks, [f"{k:g}" for k in ks])
    bottom, ceiling = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ceiling < 100 * bottom else (1,)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(panel.title)
    axes.set_xlabel("completions per prompt, K")
    axes.legend(loc="lower left")


def _check_number(curves: int) -> None:
    if not 1 <= curves <= len(_STYLES):
        raise ValueError(f"between 1 and {len(_STYLES)} curves can be told apart, not {curves}")
