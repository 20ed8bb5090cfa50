"""Density ratios to π_sft along log π_sft(y|x): what each policy made of π_sft's own samples (Figures 3 and 9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exalign.evaluation.pool import LEAST_ESS, OPTIMUM
from exalign.evaluation.schema import DensityCurve, DensityRatios, PromptDensity
from exalign.report.style import LIGHT, Look, drawable, shared_legend

_BAND_ROOM = 1.35
"""How far above the highest curve an interval is still shown."""


def draw_density(density: DensityRatios | None, looks: Mapping[str, Look], *, width: float) -> Figure | None:
    """A panel per prompt and target: the policies' curves with their intervals, the optimum in black, π_sft at 1.

    Ticks at the foot of a panel are the samples. The optimum is left out where it stands on fewer than `LEAST_ESS`
    effective ones: two draws would give two curves. `width` in inches: below 5 there is one panel in a row, else a
    prompt's panels stand side by side.
    """
    if density is None:
        return None
    shown = [
        replace(p, curves=[c for c in p.curves if c.policy != OPTIMUM or c.effective_samples >= LEAST_ESS])
        for p in density.prompts
    ]
    panels = [(i, prompt, kind) for i, prompt in enumerate(shown, 1) for kind in _kinds(density, looks)]
    columns = 1 if width < 5 else min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width, 0.6 + (2.1 if columns == 2 else 2.4) * rows), layout="constrained")
    for place, (number, prompt, kind) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        _panel(axes, prompt, [c for c in prompt.curves if _kind(c, looks) in ("", kind)], looks)
        cut = 40 if not kind else 26 if columns == 2 else 14
        text = drawable(" ".join(prompt.prompt.split()))
        axes.set_title(f"{number}: “{text if len(text) <= cut else '…' + text[-cut:]}”")
        axes.set_title(kind, loc="right", fontweight="normal")
        if place % columns == 0:
            axes.set_ylabel("π(y|x) / π_sft(y|x)")
        if place >= len(panels) - columns:
            axes.set_xlabel("log π_sft(y|x) (nats)")
    shared_legend(figure, 2 if width < 5 else 5)
    return figure


def _kinds(density: DensityRatios, looks: Mapping[str, Look]) -> list[str]:
    """The kinds of targets, each with a panel of its own; one without a name where no method is known."""
    found = {_kind(curve, looks): None for prompt in density.prompts for curve in prompt.curves}
    return [kind for kind in found if kind] or [""]


def _kind(curve: DensityCurve, looks: Mapping[str, Look]) -> str:
    look = looks.get(curve.policy)
    return "" if look is None else "from preferences" if look.hollow else "from rewards"


def _panel(axes: Axes, prompt: PromptDensity, curves: list[DensityCurve], looks: Mapping[str, Look]) -> None:
    axes.axhline(1, color=LIGHT["muted"], linewidth=1.0, linestyle=(0, (1, 2)), label="SFT")
    for curve in curves:
        look = looks.get(curve.policy)
        color, alpha = (LIGHT["ink"], 0.07) if look is None else (look.color, 0.14)
        line = {"color": color, "linewidth": 1.4} if look is None else {**look.line, "marker": "", "linewidth": 1.7}
        axes.fill_between(prompt.grid, curve.low, curve.high, color=color, alpha=alpha, linewidth=0, zorder=1)
        axes.plot(prompt.grid, curve.ratio, **line, label=curve.policy, zorder=2 if look is None else 3)
    # The same height for all panels of a prompt.
    highest = max(max(curve.ratio) for curve in prompt.curves)
    bands = max(max(curve.high) for curve in prompt.curves)
    axes.set_ylim(0, 1.05 * max(min(bands, _BAND_ROOM * highest), 1.1))
    axes.margins(x=0.01)
    axes.plot(
        prompt.samples,
        np.full(len(prompt.samples), 0.02),
        "|",
        transform=axes.get_xaxis_transform(),
        color=LIGHT["muted"],
        markersize=5,
        markeredgewidth=0.6,
        alpha=0.7,
    )
