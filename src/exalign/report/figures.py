"""The figures of a run: frontiers against KL to π_sft, what changes over steps, and density ratios to π_sft.

Each is None where a run has nothing for it. `width` is in inches: below 5 it is laid out for a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from exalign.evaluation.pool import LEAST_ESS, OPTIMUM, PROXY_OPTIMUM
from exalign.evaluation.schema import (
    BestOfN,
    Curve,
    DensityCurve,
    DensityRatios,
    Evidence,
    FrontierPoint,
    Interval,
    OptimumPoint,
    PromptDensity,
)
from exalign.report.style import LIGHT, Look, drawable, label_right, legend_within, shared_legend, vertical_bar

_TICKS_APART = 0.08
"""Of the width of the axis."""
_LABEL_INCHES = 0.35
"""Room for the number of a best of N."""


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
    """Each method's checkpoints with intervals, and π_sft; of rewards best-of-N too, and the estimated optima.

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
        _best_of_n(axes, evidence.best_of_n, width)
        ends += _end_within(axes, "best of N", LIGHT["muted"], [(p.kl_bound, p.reward) for p in evidence.best_of_n])
    if measure is REWARD and evidence.optimum:
        _optimum(axes, evidence.optimum.points)
        curve = [(p.kl.estimate, p.reward) for p in evidence.optimum.points]
        ends += _end_within(axes, OPTIMUM, LIGHT["ink"], curve)
    if measure is REWARD and (curve := _proxy(evidence)):
        kls, rewards = [kl for kl, _ in curve], [reward.estimate for _, reward in curve]
        axes.plot(kls, rewards, color=LIGHT["ink"], linewidth=1.2, linestyle="--", label=PROXY_OPTIMUM)
        ends += _end_within(axes, PROXY_OPTIMUM, LIGHT["ink"], curve)
    if start:
        axes.plot(0, start.estimate, "*", color=LIGHT["ink"], markersize=11, zorder=5, label="SFT")
        label = axes.annotate("SFT", (0, start.estimate), (8, -14), textcoords="offset points", fontsize=8.5, zorder=6)
        label.set_path_effects([withStroke(linewidth=2.5, foreground=LIGHT["paper"])])  # readable on any line
    axes.set_xlabel("KL to the supervised policy (nats, on a √ scale)")
    axes.set_ylabel(measure.label)
    if narrow:
        handles, _ = axes.get_legend_handles_labels()
        legend_within(figure, handles, 2, loc="outside lower center", handlelength=2.4, columnspacing=1.0)
    else:
        label_right(axes, ends)
    return figure


def _limit(axes: Axes, evidence: Evidence, points: Sequence[FrontierPoint], measure: Measure) -> None:
    """Show all checkpoints with their intervals, and of the other curves what lies in that range of KL."""
    values = [value for point in points if (value := measure.read(point))]
    values += [start] if (start := measure.start(evidence)) else []
    kls = [kl for point in points if point.kl for kl in point.kl.ends]
    farthest = max([0.05, *(1.03 * kl for kl in kls)])
    ys = [y for value in values for y in value.ends]
    if measure is REWARD:
        optimum = evidence.optimum.points if evidence.optimum else []
        ys += [y for p in optimum if p.kl.estimate <= farthest for y in p.reward.ends]
        ys += [p.reward.estimate for p in evidence.best_of_n if p.kl_bound <= farthest]
        ys += [reward.estimate for kl, reward in _proxy(evidence) if kl <= farthest]
    if measure.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    ys = ys or [0.0]
    room = 0.05 * (max(ys) - min(ys)) or 0.05
    _kl_axis(axes, min([0.0, *kls]), farthest)
    axes.set_ylim(min(ys) - room, max(ys) + room)


def _proxy(evidence: Evidence) -> list[tuple[float, Interval]]:
    """KL and reward of the optimum of the training reward, as far as the pool shows it."""
    points = evidence.proxy_optimum.points if evidence.proxy_optimum else []
    return [(point.kl.estimate, point.reward) for point in points if point.reliable]


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
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


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
        xerr=_arms([p.kl for p in points if p.kl]),
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
        low, high = zip(*(p.reward.ends for p in reliable), strict=True)
        axes.fill_between(kl, low, high, color=LIGHT["ink"], alpha=0.08, linewidth=0, zorder=1)
        axes.plot(kl, [p.reward.estimate for p in reliable], color=LIGHT["ink"], linewidth=1.4, label=OPTIMUM)
    if not beyond or beyond[0].kl.estimate >= axes.get_xlim()[1]:
        return
    xs, ys = [p.kl.estimate for p in beyond], [p.reward.estimate for p in beyond]
    axes.plot(xs, ys, color=LIGHT["ink"], linewidth=1.2, linestyle=(0, (1, 2)), label="too few samples for it")


def _best_of_n(axes: Axes, points: Sequence[BestOfN], width: float) -> None:
    xs, ys = [p.kl_bound for p in points], [p.reward.estimate for p in points]
    style = {"color": LIGHT["muted"], "linewidth": 1.0, "marker": "|", "markersize": 6, "label": "best of N"}
    axes.plot(xs, ys, zorder=2, **style)  # type: ignore[arg-type]
    last, farthest = 0.0, axes.get_xlim()[1]
    room = _LABEL_INCHES / width * np.sqrt(farthest)
    for point in points[1:]:
        if point.kl_bound < farthest and np.sqrt(point.kl_bound) - last >= room:
            last = np.sqrt(point.kl_bound)
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


def _arms(values: Sequence[Interval]) -> np.ndarray:
    return np.array([(v.estimate - v.ends[0], v.ends[1] - v.estimate) for v in values]).T.clip(0)


METRICS = {
    "loss": "loss",
    "held_out_loss": "loss on held-out pairs",
    "kl": "KL, estimated (nats)",
    "reward": "weighted reward",
    "log_ratio_spread": "std of log-ratios",
    "reward_correlation": "corr(log-ratio, reward)",
    "gradient_agreement": "gradient agreement",
    "saturated": "share saturated",
    "reward_spread": "std(r) / β_r",
    "effective_samples": "effective samples",
    "equal_rewards": "share with equal rewards",
    "entropy": "entropy (nats per token)",
    "unfinished": "share cut at the limit",
    "completion_tokens": "completion tokens",
    "accuracy": "accuracy",
    "held_out_accuracy": "accuracy on held-out pairs",
    "grad_norm": "gradient norm",
}
"""Metrics that are drawn, in this order, with their titles; the others stay in the evidence file."""

_SHARES = {
    *(METRICS[name] for name in ("saturated", "accuracy", "held_out_accuracy", "equal_rewards", "unfinished")),
    *("win rate against SFT", "accuracy (mean σ(reward))", "share that finished"),
}
"""Titles of panels whose axis never leaves 0 to 1 by more than a margin."""


def draw_alignment(evidence: Evidence, looks: Mapping[str, Look], *, width: float) -> Figure | None:
    """Every method's training metrics, a panel per metric; None where no method logged any."""
    by_stage = {curve.stage: curve for curve in evidence.curves}
    curves = {name: by_stage[stage] for name in looks if (stage := f"align/{name}") in by_stage}
    drawn = {
        title: [(c, metric, looks[name].color, looks[name].dashes) for name, c in curves.items() if _has(c, metric)]
        for metric, title in METRICS.items()
    }
    figure = _draw_curves({title: lines for title, lines in drawn.items() if lines}, width)
    if figure is not None:
        _legend(figure, {name: looks[name] for name in curves}, width, markers=False)
    return figure


def draw_other_stages(evidence: Evidence, *, width: float) -> Figure | None:
    """Loss (and accuracy, where logged) of the stages before alignment; None where there are none."""
    order = {stage.name: i for i, stage in enumerate(evidence.stages)}
    shown = {
        f"{curve.stage}: {METRICS[metric]}": [(curve, metric, LIGHT["ink"], "-")]
        for curve in sorted(evidence.curves, key=lambda curve: order.get(curve.stage, len(order)))
        if not curve.stage.startswith("align/")
        for metric in ("loss", "accuracy")
        if _has(curve, metric)
    }
    return _draw_curves(shown, width)


def draw_checkpoints(evidence: Evidence, looks: Mapping[str, Look], *, width: float) -> Figure | None:
    """What each checkpoint is like on the evaluation prompts: reward with its spread over samples, KL, and so on."""
    wanted: dict[str, Callable[[FrontierPoint], Interval | float | None]] = {
        "mean reward": lambda p: p.reward,
        "std of rewards": lambda p: p.reward_std,
        "KL to π_sft (nats)": lambda p: p.kl,
        "win rate against SFT": lambda p: p.win_vs_sft.rate if p.win_vs_sft else None,
        "accuracy (mean σ(reward))": lambda p: p.accuracy,
        "accuracy on held-out pairs": lambda p: p.held_out.accuracy if p.held_out else None,
        "held-out margin (nats)": lambda p: p.held_out.margin if p.held_out else None,
        "tokens per sample": lambda p: p.tokens,
        "share that finished": lambda p: p.finished,
    }
    paths = _along(evidence)
    points = [point for path in paths.values() for point in path if point.step > 0]
    shown = {title: read for title, read in wanted.items() if any(read(point) is not None for point in points)}
    if not shown:
        return None
    figure, panels = _panels(list(shown), width)
    for axes, read in zip(panels, shown.values(), strict=True):
        for name, path in paths.items():
            values = {point.step: value for point in path if (value := read(point)) is not None}
            heights = [value.estimate if isinstance(value, Interval) else value for value in values.values()]
            axes.plot(list(values), heights, **looks[name].line, zorder=3)
            for step, value in values.items():
                if isinstance(value, Interval) and step > 0:
                    vertical_bar(axes, step, value, looks[name].color, linewidth=0.9, alpha=0.55, zorder=2)
    _bound_shares(panels)
    last = max(point.step for point in points)
    for axes in panels:
        axes.set_xlim(-0.03 * last, 1.03 * last)
    _legend(figure, {name: looks[name] for name in paths}, width, markers=True)
    return figure


def _along(evidence: Evidence) -> dict[str, list[FrontierPoint]]:
    """π_sft and the checkpoints of every method that has some; the ends of a sweep's trainings have no common steps."""
    start = [evidence.sft] if evidence.sft else []
    return {m.name: [*start, *m.points] for m in evidence.methods if m.points and m.sweep is None}


def _draw_curves(shown: Mapping[str, Sequence[tuple[Curve, str, str, str]]], width: float) -> Figure | None:
    """A panel for each title, with the curves of metrics in their colour and dashes."""
    if not shown:
        return None
    figure, panels = _panels(list(shown), width)
    for axes, lines in zip(panels, shown.values(), strict=True):
        for curve, metric, color, dashes in lines:
            pairs = zip(curve.steps, curve.values[metric], strict=True)
            steps, values = np.array([(step, value) for step, value in pairs if value is not None]).T
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
            axes.plot(steps, smooth(values), color=color, linestyle=dashes, linewidth=1.4)
    _bound_shares(panels)
    return figure


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A running mean over about a fifteenth of the curve, centred except at both ends.

    >>> smooth(np.arange(5.0))
    array([0., 1., 2., 3., 4.])
    """
    window = np.ones(2 * (len(values) // 30) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _has(curve: Curve, metric: str) -> bool:
    return any(value is not None for value in curve.values.get(metric, ()))


def _panels(titles: Sequence[str], width: float) -> tuple[Figure, list[Axes]]:
    choices = (4, 3) if width >= 5 else (2,)
    columns = min(len(titles), min(choices, key=lambda columns: -len(titles) % columns))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(width, 0.45 + 1.85 * rows), layout="constrained")
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(len(titles))]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
        axes.margins(x=0.02)
        axes.ticklabel_format(axis="y", useOffset=False)
    for axes in panels[-columns:]:
        axes.set_xlabel("step")
    return figure, panels


def _bound_shares(panels: Sequence[Axes]) -> None:
    for axes in panels:
        if axes.get_title(loc="left").split(": ")[-1] in _SHARES:
            low, high = axes.get_ylim()
            axes.set_yticks([tick for tick in axes.get_yticks() if -1e-9 < tick < 1 + 1e-9])
            axes.set_ylim(max(low, -0.03), min(high, 1.03))


def _legend(figure: Figure, looks: Mapping[str, Look], width: float, *, markers: bool) -> None:
    handles = [
        figure.axes[0].plot([], [], **(look.line if markers else {**look.line, "marker": ""}), label=name)[0]
        for name, look in looks.items()
    ]
    columns = 2 if width < 5 else min(5, len(handles))
    legend_within(figure, handles, columns)


def draw_reward_against_step(evidence: Evidence, looks: Mapping[str, Look], *, width: float) -> Figure | None:
    """A panel per method: mean reward of its checkpoints with intervals, the other methods' in grey behind it.

    The band is one standard deviation of the rewards of a prompt's samples to either side, averaged over prompts. None
    without scored checkpoints.
    """
    paths = _along(evidence)
    if not paths or not evidence.scored:
        return None
    columns = 1 if width < 5 else 2 if len(paths) in (2, 4) else min(3, len(paths))
    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(width, 0.4 + (1.9 if width < 5 else 2.3) * rows), layout="constrained")
    shared = None
    for place, (name, points) in enumerate(paths.items()):
        axes = shared = figure.add_subplot(rows, columns, place + 1, sharex=shared, sharey=shared)
        for other in paths:
            if other != name:
                axes.plot(*_rewards(paths[other]), color=LIGHT["muted"], linewidth=0.8, alpha=0.6, zorder=1)
        steps, rewards = _rewards(points)
        spread = np.array([np.nan if p.reward_std_within is None else p.reward_std_within for p in points])
        look = looks[name]
        axes.fill_between(steps, rewards - spread, rewards + spread, color=look.color, alpha=0.15, linewidth=0)
        for point in points:
            if point.reward:
                vertical_bar(axes, point.step, point.reward, look.color, linewidth=1.2)
        axes.plot(steps, rewards, **look.line)
        axes.set_title(name)
        if place % columns == 0:
            axes.set_ylabel("mean reward")
        if place >= len(paths) - columns:
            axes.set_xlabel("training step")
    return figure


def _rewards(points: list[FrontierPoint]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p.step for p in points]), np.array([p.reward.estimate for p in points if p.reward])


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
        _density(axes, prompt, [c for c in prompt.curves if _kind(c, looks) in ("", kind)], looks)
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


def _density(axes: Axes, prompt: PromptDensity, curves: list[DensityCurve], looks: Mapping[str, Look]) -> None:
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
