"""What one method has more than another at equal KL, in every run and on average."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exalign.evaluation.across_runs import RunResults, difference_at
from exalign.report.labels import drawable
from exalign.report.style import LIGHT, figure_style
from exalign.report.svg import WIDTH, save_figure, write_under

NAME = "differences"
STEPS = 40
"""KLs at which the figure is drawn, evenly up to the largest that is asked for."""
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


def write_differences(runs: Sequence[RunResults], folder: Path) -> Path | None:
    """Draw the figure to `folder` as PNG and SVG, with its data, n and interval under it; the PNG's path."""
    with figure_style():
        figure = draw_differences(runs, width=WIDTH)
        if figure is None:
            return None
        write_under(figure, _caption(runs))
        save_figure(figure, folder, NAME)
    return folder / f"{NAME}.png"


def draw_differences(runs: Sequence[RunResults], *, width: float) -> Figure | None:
    """A panel for each pair that `compare` sets against each other: the difference of their rewards against KL.

    A line for each run, at the KLs that `runs` was read with. As far as all of them reach, a thick line is their mean
    with Student's 95 % interval; of a single run the interval is over prompts. None where no run has two such methods.
    """
    pairs = [
        pair
        for pair in dict.fromkeys(pair for run in runs for pair in run.differences)
        if any(value is not None for run in runs for value in run.differences.get(pair, {}).values())
    ]
    if not pairs:
        return None
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for panel, pair in zip(axes, pairs, strict=True):
        panel.set_title(drawable(" − ".join(pair)))
        panel.set_xlabel("KL to the supervised policy (nats)")
        panel.axhline(0, color=LIGHT["muted"], linewidth=1.0)
        _panel(panel, runs, pair)
    axes[0].set_ylabel("difference of rewards")
    handles = {str(line.get_label()): line for panel in axes for line in panel.lines}
    figure.legend(
        handles=[line for name, line in handles.items() if not name.startswith("_")],
        loc="outside upper left",
        ncols=5,
        handlelength=3.0,
    )
    return figure


def _panel(axes: Axes, runs: Sequence[RunResults], pair: tuple[str, str]) -> None:
    having = [run for run in runs if pair in run.differences]
    axes.set_title(f"n = {len(having)}" if len(runs) > 1 else "", loc="right", fontweight="normal")
    for run, dashes in zip(runs, cycle(_DASHES), strict=False):
        found = [(kl, value) for kl, value in sorted(run.differences.get(pair, {}).items()) if value is not None]
        line = np.array([(kl, value.estimate, value.low, value.high) for kl, value in found])
        if found and len(runs) == 1:
            _thick(axes, line, drawable(run.name))
        elif found:
            axes.plot(*line.T[:2], linestyle=dashes, color=LIGHT["ink"], linewidth=0.9, label=drawable(run.name))
    means = [(kl, difference_at(having, pair, kl)) for kl in sorted(having[0].differences[pair])]
    common = [(kl, m.mean, m.low, m.high) for kl, m in means if m is not None and m.runs == len(having) > 1]
    if common:
        _thick(axes, np.array(common, dtype=float), "mean over runs")


def _thick(axes: Axes, line: np.ndarray, label: str) -> None:
    """`line` has columns KL, value, low, high."""
    kls, values, low, high = line.T
    axes.plot(kls, values, color=LIGHT["exo-1"], linewidth=2.2, label=label)
    axes.fill_between(kls, low, high, color=LIGHT["exo-1"], alpha=0.14, linewidth=0)


def _caption(runs: Sequence[RunResults]) -> str:
    prompts = " and ".join(str(n) for n in sorted({run.evidence.num_prompts for run in runs}))
    what = f"Rewards of {prompts} prompts, interpolated between checkpoints, paired by prompt. "
    if len(runs) == 1:
        return f"Run {runs[0].name}. {what}Band: 95 % bootstrap interval over prompts."
    return (
        f"n runs have both methods. {what}Band: Student's 95 % interval over those runs, as far as all of them reach."
    )
