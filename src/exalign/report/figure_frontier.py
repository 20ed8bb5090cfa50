"""The frontiers: reward, the classifier's accuracy and held-out preferences against KL to π_sft; the best possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from exalign.evaluation.schema import BestOfN, Evidence, FrontierPoint, Interval, OptimumPoint
from exalign.report.style import LIGHT, Look, label_right
from exalign.report.wording import within_a_share

_TICKS_APART = 0.08
"""Of the width of the axis."""


@dataclass(frozen=True)
class Measure:
    """What stands against KL: how it is read off a checkpoint, and its value for π_sft."""

    label: str
    read: Callable[[FrontierPoint], Interval | None]
    start: Callable[[Evidence], Interval | None]
    share: bool = True


REWARD = Measure("mean reward", lambda p: p.reward, lambda e: e.sft.reward if e.sft else None, share=False)
CLASSIFIER = Measure(
    "probability of the label, by the classifier", lambda p: p.accuracy, lambda e: e.sft.accuracy if e.sft else None
)
PAIRS = Measure(
    "accuracy on held-out pairs",
    lambda p: p.held_out.accuracy if p.held_out else None,
    lambda _: Interval(0.5, None, None, 0),
)
MARGIN = Measure(
    "margin on held-out pairs (nats)",
    lambda p: p.held_out.margin if p.held_out else None,
    lambda _: Interval(0.0, None, None, 0),
    share=False,
)


def draw_frontier(
    evidence: Evidence, looks: Mapping[str, Look], measure: Measure | None = None, *, width: float
) -> Figure | None:
    """Each method's checkpoints with intervals, and π_sft; of rewards best-of-N too, and the estimated optimum.

    The measure is by default the reward, or without a scorer the accuracy on held-out pairs; None where no checkpoint
    has another one. `width` in inches: below 5 the labels stand under the axes instead of at the ends of the lines.
    """
    measure = measure or (REWARD if evidence.scored else PAIRS)
    shown = [(m, kept) for m in evidence.methods if (kept := [p for p in m.points if p.kl and measure.read(p)])]
    if not shown and measure is not REWARD:
        return None
    narrow = width < 5
    heights = (4.9, 4.6) if measure is REWARD else (4.4, 4.2)
    figure = Figure(figsize=(width, heights[narrow]), layout="constrained")
    axes, start = figure.add_subplot(), measure.start(evidence)
    ends = [_path(axes, start, method.name, points, looks[method.name], measure.read) for method, points in shown]
    _limit(axes, evidence, [point for _, points in shown for point in points], measure)
    if measure is REWARD and evidence.best_of_n:
        _best_of_n(axes, evidence.best_of_n)
        ends += _end_within(axes, "best of N", LIGHT["muted"], [(p.kl_bound, p.reward) for p in evidence.best_of_n])
    if measure is REWARD and evidence.optimum:
        _optimum(axes, evidence.optimum.points)
        curve = [(p.kl.estimate, p.reward) for p in evidence.optimum.points]
        ends += _end_within(axes, "estimated optimum", LIGHT["ink"], curve)
    if start:
        axes.plot(0, start.estimate, "*", color=LIGHT["ink"], markersize=11, zorder=5, label="SFT")
        label = axes.annotate("SFT", (0, start.estimate), (8, -14), textcoords="offset points", fontsize=8.5, zorder=6)
        label.set_path_effects([withStroke(linewidth=2.5, foreground=LIGHT["paper"])])  # readable on any line
    axes.set_xlabel("KL to the supervised policy (nats, on a √ scale)")
    axes.set_ylabel(measure.label)
    if narrow:
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.4, columnspacing=1.0)
    else:
        label_right(axes, ends)
    return figure


def _limit(axes: Axes, evidence: Evidence, points: Sequence[FrontierPoint], measure: Measure) -> None:
    """Show all checkpoints with their intervals, and of the other curves what lies in that range of KL."""
    values = [value for point in points if (value := measure.read(point))]
    values += [start] if (start := measure.start(evidence)) else []
    farthest = max([0.05, *(1.03 * _bounds(p.kl)[1] for p in points)])
    ys = [y for value in values for y in _bounds(value)]
    if measure is REWARD:
        optimum = evidence.optimum.points if evidence.optimum else []
        ys += [y for p in optimum if p.kl.estimate <= farthest for y in _bounds(p.reward)]
        ys += [p.reward.estimate for p in evidence.best_of_n if p.kl_bound <= farthest]
    if measure.share:
        ys = [within_a_share(y) for y in ys]
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    ys = ys or [0.0]
    room = 0.05 * (max(ys) - min(ys)) or 0.05
    _kl_axis(axes, min([0.0, *(_bounds(p.kl)[0] for p in points)]), farthest)
    axes.set_ylim(min(ys) - room, max(ys) + room)


def _kl_axis(axes: Axes, least: float, farthest: float) -> None:
    """KL on a √ scale, on which reward is nearly straight near π_sft and a method that went far crowds out no other."""

    def root(x: np.ndarray) -> np.ndarray:
        return np.sign(x) * np.sqrt(np.abs(x))

    axes.set_xscale("function", functions=(root, lambda x: np.sign(x) * np.square(x)))
    axes.set_xlim(min(1.05 * least, -(0.025**2) * farthest), farthest)
    ticks = [0.0]
    for tick in sorted(factor * 10.0**power for power in range(-4, 5) for factor in (1, 2, 5)):
        if tick <= farthest and np.sqrt(tick) - np.sqrt(ticks[-1]) >= _TICKS_APART * np.sqrt(farthest):
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])


def _path(
    axes: Axes,
    start: Interval | None,
    name: str,
    points: Sequence[FrontierPoint],
    look: Look,
    read: Callable[[FrontierPoint], Interval | None],
) -> tuple[str, str, float, float]:
    """Draw a method's checkpoints, from π_sft where it is given; return where its label goes."""
    values = [value for point in points if (value := read(point)) is not None]
    first = 0 if start is None else 1
    kls = np.array([0.0] * first + [p.nats for p in points])
    heights = np.array([value.estimate for value in ([start] if start else []) + values])
    axes.plot(*_between(kls, heights), **{**look.line, "marker": ""}, zorder=3)
    axes.errorbar(
        kls[first:],
        heights[first:],
        xerr=_arms([p.kl for p in points]),
        yerr=_arms(values),
        fmt="none",
        ecolor=look.color,
        elinewidth=0.9,
        alpha=0.55,
        zorder=3,
    )
    axes.plot(kls[first:], heights[first:], **{**look.line, "linestyle": ""}, zorder=4)
    axes.plot([], [], **look.line, label=name)
    return name, look.color, float(kls[-1]), float(heights[-1])


def _between(kls: np.ndarray, rewards: np.ndarray, *, pieces: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """The points with curves between them that are linear in √KL, as comparisons at equal KL take the reward."""
    places = np.linspace(0, len(kls) - 1, pieces * (len(kls) - 1) + 1)
    corners = np.arange(len(kls))
    roots = np.interp(places, corners, np.sqrt(np.maximum(kls, 0)))
    curve = roots**2 + np.interp(places, corners, np.minimum(kls, 0))
    return curve, np.interp(places, corners, rewards)


def _optimum(axes: Axes, points: Sequence[OptimumPoint]) -> None:
    reliable = [p for p in points if p.reliable]
    beyond = [*reliable[-1:], *(p for p in points if not p.reliable)]
    kl = [p.kl.estimate for p in reliable]
    if reliable:
        low, high = zip(*(_bounds(p.reward) for p in reliable), strict=True)
        axes.fill_between(kl, low, high, color=LIGHT["ink"], alpha=0.08, linewidth=0, zorder=1)
        axes.plot(
            kl, [p.reward.estimate for p in reliable], color=LIGHT["ink"], linewidth=1.4, label="estimated optimum"
        )
    xs, ys = [p.kl.estimate for p in beyond], [p.reward.estimate for p in beyond]
    axes.plot(xs, ys, color=LIGHT["ink"], linewidth=1.2, linestyle=(0, (1, 2)), label="too few samples for it")


def _best_of_n(axes: Axes, points: Sequence[BestOfN]) -> None:
    xs, ys = [p.kl_bound for p in points], [p.reward.estimate for p in points]
    style = {"color": LIGHT["muted"], "linewidth": 1.0, "marker": "|", "markersize": 6, "label": "best of N"}
    axes.plot(xs, ys, zorder=2, **style)  # type: ignore[arg-type]
    for point in points[1:]:
        if axes.get_xlim()[0] < point.kl_bound < axes.get_xlim()[1]:
            at = (point.kl_bound, point.reward.estimate)
            axes.annotate(
                str(point.n), at, (0, -10), textcoords="offset points", ha="center", fontsize=7, color=LIGHT["muted"]
            ).set_clip_on(True)


def _end_within(
    axes: Axes, name: str, color: str, curve: Sequence[tuple[float, Interval]]
) -> list[tuple[str, str, float, float]]:
    """Where a curve leaves the visible range of KL, for its label."""
    last = axes.get_xlim()[1]
    xs, ys = np.array([x for x, _ in curve]), np.array([y.estimate for _, y in curve])
    if not (xs <= last).any():
        return []
    x = min(last, float(xs.max()))
    return [(name, color, x, float(np.interp(x, xs, ys)))]


def _bounds(value: Interval | None) -> tuple[float, float]:
    assert value is not None
    return (
        value.estimate if value.low is None else value.low,
        value.estimate if value.high is None else value.high,
    )


def _arms(values: Sequence[Interval | None]) -> np.ndarray:
    bounds = np.array([_bounds(value) for value in values])
    estimates = np.array([value.estimate for value in values if value])
    return np.clip(np.stack([estimates - bounds[:, 0], bounds[:, 1] - estimates]), 0, None)
