"""Over steps: what training logged, what the checkpoints are like, and reward with its spread (Figure 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from exalign.evaluation.schema import Curve, Evidence, FrontierPoint, Interval
from exalign.report.style import LIGHT, Look, vertical_bar

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
    shown = {
        title: [(curve, metric, looks[name].color, looks[name].dashes) for name, curve in curves.items()]
        for metric, title in METRICS.items()
        if any(_has(curve, metric) for curve in curves.values())
    }
    figure = _draw_curves(shown, width)
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
    along = [method for method in evidence.methods if method.sweep is None]  # ends of several trainings have no steps
    points = {method.name: method.points for method in along if method.points}
    shown = {
        title: read for title, read in wanted.items() if any(read(p) is not None for ps in points.values() for p in ps)
    }
    if not shown:
        return None
    figure, panels = _panels(list(shown), width)
    for axes, read in zip(panels, shown.values(), strict=True):
        for name, checkpoints in points.items():
            along_it = [*([evidence.sft] if evidence.sft else []), *checkpoints]
            values = {point.step: value for point in along_it if (value := read(point)) is not None}
            heights = [value.estimate if isinstance(value, Interval) else value for value in values.values()]
            axes.plot(list(values), heights, **looks[name].line, zorder=3)
            for step, value in values.items():
                if isinstance(value, Interval) and step > 0:
                    vertical_bar(axes, step, value, looks[name].color, linewidth=0.9, alpha=0.55, zorder=2)
    _bound_shares(panels)
    last = max(p.step for checkpoints in points.values() for p in checkpoints) or 1
    for axes in panels:
        axes.set_xlim(-0.03 * last, 1.03 * last)
    _legend(figure, {name: looks[name] for name in points}, width, markers=True)
    return figure


def _draw_curves(shown: Mapping[str, Sequence[tuple[Curve, str, str, str]]], width: float) -> Figure | None:
    """A panel for each title, with the curves of metrics in their colour and dashes."""
    if not shown:
        return None
    figure, panels = _panels(list(shown), width)
    for axes, lines in zip(panels, shown.values(), strict=True):
        for curve, metric, color, dashes in lines:
            if _has(curve, metric):
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
    half = len(values) // 30
    totals = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (totals[last] - totals[first]) / (last - first)


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
            axes.set_ylim(max(low, -0.03), min(high, 1.03))


def _legend(figure: Figure, looks: Mapping[str, Look], width: float, *, markers: bool) -> None:
    handles = [
        figure.axes[0].plot([], [], **(look.line if markers else {**look.line, "marker": ""}), label=name)[0]
        for name, look in looks.items()
    ]
    columns = 2 if width < 5 else min(5, len(handles))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.6)


def draw_reward_against_step(evidence: Evidence, looks: Mapping[str, Look], *, width: float) -> Figure | None:
    """A panel per method: mean reward of its checkpoints with intervals, the other methods' in grey behind it.

    The band is one standard deviation of the rewards of a prompt's samples to either side, averaged over prompts. None
    without scored checkpoints.
    """
    along = [method for method in evidence.methods if method.points and method.sweep is None]
    paths = {method.name: [*([evidence.sft] if evidence.sft else []), *method.points] for method in along}
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
