"""The frontiers: reward, the classifier's accuracy and held-out preferences against KL to π_sft; the best possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from exalign.evaluation.schema import BestOfN, Evidence, FrontierPoint, Interval, OptimumPoint
from exalign.report.style import LIGHT, Look, label_right

_TICKS_APART = 0.08
"""Of the width of the axis."""


def draw_frontier(evidence: Evidence, looks: Mapping[str, Look], *, width: float) -> Figure | None:
    """Each method's checkpoints with intervals, π_sft, best-of-N, and the estimated optimum with its band.

    `width` in inches: below 5 the labels stand under the axes instead of at the ends of the lines. Without a scorer the
    accuracy on held-out pairs takes the place of the reward; None where there are none either.
    """
    if not evidence.scored:
        return draw_measure(evidence, looks, PAIRS, width=width)
    narrow = width < 5
    figure = Figure(figsize=(width, 4.6 if narrow else 4.9), layout="constrained")
    axes = figure.add_subplot()
    start = evidence.sft.reward if evidence.sft else None
    ends: list[tuple[str, str, float, float]] = []
    for method in evidence.methods:
        if points := [p for p in method.points if p.kl]:
            ends.append(_path(axes, start, method.name, points, looks[method.name], lambda p: p.reward))
    low, high = _limits(evidence)
    _kl_axis(axes, low[0], high[0])
    axes.set_ylim(low[1], high[1])
    if evidence.best_of_n:
        _best_of_n(axes, evidence.best_of_n)
        ends += _end_within(axes, "best of N", LIGHT["muted"], [(p.kl_bound, p.reward) for p in evidence.best_of_n])
    if evidence.optimum:
        _optimum(axes, evidence.optimum.points)
        curve = [(p.kl.estimate, p.reward) for p in evidence.optimum.points]
        ends += _end_within(axes, "estimated optimum", LIGHT["ink"], curve)
    if start:
        _start(axes, start.estimate)
    _finish(figure, axes, ends, "mean reward", narrow)
    return figure


@dataclass(frozen=True)
class Measure:
    """What may stand against KL beside the reward: how it is read off a checkpoint, and its value for π_sft."""

    label: str
    read: Callable[[FrontierPoint], Interval | None]
    start: Callable[[Evidence], Interval | None]
    share: bool = True


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


def draw_measure(evidence: Evidence, looks: Mapping[str, Look], measure: Measure, *, width: float) -> Figure | None:
    """The checkpoints that have the measure against KL, as `draw_frontier`; None where none has it."""
    shown = [(m, kept) for m in evidence.methods if (kept := [p for p in m.points if p.kl and measure.read(p)])]
    if not shown:
        return None
    figure = Figure(figsize=(width, 4.2 if width < 5 else 4.4), layout="constrained")
    axes, start = figure.add_subplot(), measure.start(evidence)
    ends = [_path(axes, start, method.name, points, looks[method.name], measure.read) for method, points in shown]
    points = [point for _, kept in shown for point in kept]
    values = [value for point in points if (value := measure.read(point))] + ([start] if start else [])
    farthest = max(max(_bounds(p.kl)[1] for p in points) * 1.03, 0.05)
    ys = [min(1.0, max(0.0, y)) if measure.share else y for value in values for y in _bounds(value)]
    room = 0.05 * (max(ys) - min(ys)) or 0.05
    _kl_axis(axes, min(_bounds(p.kl)[0] for p in points), farthest)
    axes.set_ylim(min(ys) - room, max(ys) + room)
    if measure.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    if start:
        _start(axes, start.estimate)
    _finish(figure, axes, ends, measure.label, width < 5)
    return figure


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


def _start(axes: Axes, height: float) -> None:
    axes.plot(0, height, "*", color=LIGHT["ink"], markersize=11, zorder=5, label="SFT")
    axes.annotate("SFT", (0, height), (7, -10), textcoords="offset points", fontsize=8.5)


def _finish(
    figure: Figure, axes: Axes, ends: Sequence[tuple[str, str, float, float]], ylabel: str, narrow: bool
) -> None:
    axes.set_xlabel("KL to the supervised policy (nats, on a √ scale)")
    axes.set_ylabel(ylabel)
    if narrow:
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.4, columnspacing=1.0)
    else:
        label_right(axes, ends)


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


def _limits(evidence: Evidence) -> tuple[tuple[float, float], tuple[float, float]]:
    """What to show: all checkpoints with their intervals; of the other curves what lies in that range of KL."""
    points = [p for method in evidence.methods for p in method.points if p.kl]
    points += [evidence.sft] if evidence.sft else []
    xs = [x for p in points for x in _bounds(p.kl)] or [0.0]
    farthest = max(max(xs) * 1.03, 0.05)
    ys = [y for p in points if p.reward for y in _bounds(p.reward)]
    if evidence.optimum:
        ys += [y for p in evidence.optimum.points if p.kl.estimate <= farthest for y in _bounds(p.reward)]
    ys += [p.reward.estimate for p in evidence.best_of_n if p.kl_bound <= farthest]
    ys = ys or [0.0]
    room = 0.05 * (max(ys) - min(ys)) or 0.5
    return (min(xs), min(ys) - room), (farthest, max(ys) + room)


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
