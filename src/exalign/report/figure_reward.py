"""Reward with its spread against training step (Figure 8)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from exalign.evaluation.schema import Evidence, FrontierPoint
from exalign.report.style import LIGHT, Look


def draw_reward_against_step(evidence: Evidence, looks: Mapping[str, Look], *, width: float) -> Figure | None:
    """A panel per method: mean reward of its checkpoints with intervals, the other methods' in grey behind it.

    The band is one standard deviation of the rewards of a prompt's samples to either side, averaged over prompts. None
    without evaluated checkpoints.
    """
    paths = {method.name: _from_start(evidence, method.points) for method in evidence.methods if method.points}
    if not paths:
        return None
    columns = 1 if width < 5 else 2 if len(paths) in (2, 4) else min(3, len(paths))
    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(width, 0.4 + (1.9 if width < 5 else 2.3) * rows), layout="constrained")
    shared = None
    for place, (name, points) in enumerate(paths.items()):
        axes = shared = figure.add_subplot(rows, columns, place + 1, sharex=shared, sharey=shared)
        for other in paths:
            if other != name:
                axes.plot(*_series(paths[other]), color=LIGHT["muted"], linewidth=0.8, alpha=0.6, zorder=1)
        steps, rewards = _series(points)
        spread = np.array([np.nan if p.reward_std_within is None else p.reward_std_within for p in points])
        look = looks[name]
        axes.fill_between(steps, rewards - spread, rewards + spread, color=look.color, alpha=0.15, linewidth=0)
        for point in points:
            if point.reward.low is not None and point.reward.high is not None:
                axes.vlines(point.step, point.reward.low, point.reward.high, color=look.color, linewidth=1.2)
        axes.plot(steps, rewards, **look.line)
        axes.set_title(name)
        if place % columns == 0:
            axes.set_ylabel("mean reward")
        if place >= len(paths) - columns:
            axes.set_xlabel("training step")
    return figure


def _from_start(evidence: Evidence, points: list[FrontierPoint]) -> list[FrontierPoint]:
    return [*([evidence.sft] if evidence.sft else []), *points]


def _series(points: list[FrontierPoint]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p.step for p in points]), np.array([p.reward.estimate for p in points])
