"""The picture of `benchmarks.sweep`: seconds of a step on log axes, with slopes, beside the necessary work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from exalign.report.style import LIGHT, figure_style

NAMES = {
    "k": "completions per prompt, K",
    "prompt": "prompt tokens",
    "completion": "completion tokens",
    "vocabulary": "vocabulary",
    "prompts": "prompts",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG with a panel per quantity that was swept; the work is scaled to the time of the first point."""
    found = result["sweeps"]
    with figure_style():
        figure = Figure(figsize=(9.6, 2.6), layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, one in zip(panels, found, strict=True):
            values = [point["value"] for point in one["points"]]
            seconds = [point["seconds"] for point in one["points"]]
            work = [point["gflop"] * seconds[0] / one["points"][0]["gflop"] for point in one["points"]]
            axes.loglog(values, work, color=LIGHT["muted"], linestyle="--", linewidth=1.2, label="necessary work")
            axes.loglog(values, seconds, color=LIGHT["exo-1"], marker="o", label="time")
            axes.set_xticks(values, [f"{value // 1024}k" if value >= 8192 else str(value) for value in values])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_title(f"slope {one['slope']:.2f} (work {one['work_slope']:.2f})")
            axes.set_xlabel(NAMES[one["dimension"]])
        panels[0].set_ylabel("seconds of a step")
        panels[0].legend(loc="upper left")
        figure.savefig(path, dpi=150)
