"""What β_π and β_r do: methods of one run that differ in nothing else, side by side (Figure 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exalign.evaluation.schema import Evidence, Interval, MethodEvidence
from exalign.report.style import Look, looks_of

SIGNS = {"beta_pi": "β_π", "beta_r": "β_r"}
LEAST_VALUES = 2


@dataclass(frozen=True)
class Ablation:
    """Evaluated methods in the order of the one setting in which they differ."""

    setting: str
    methods: list[MethodEvidence]

    @property
    def values(self) -> list[float]:
        return [float(method.settings[self.setting]) for method in self.methods]


def ablations(methods: Sequence[MethodEvidence]) -> list[Ablation]:
    """The largest groups of methods that differ in β_π alone, or in β_r alone, each with at least two values."""
    found = []
    for setting in SIGNS:

        def others(method: MethodEvidence, setting: str = setting) -> str:
            return repr(sorted((key, value) for key, value in method.settings.items() if key != setting))

        able = [m for m in methods if m.points and isinstance(m.settings.get(setting), int | float)]
        for _, group in groupby(sorted(able, key=others), key=others):
            ordered = sorted(group, key=lambda method: method.settings[setting])
            if len({method.settings[setting] for method in ordered}) >= LEAST_VALUES:
                found.append(Ablation(setting, ordered))
    return found


def draw_ablation(evidence: Evidence, *, width: float) -> Figure | None:
    """Reward and win rates at each method's end against β_π (left) and β_r (right); None without such methods.

    The KL at which a reward was reached stands above it.
    """
    groups = ablations(evidence.methods)
    if not groups:
        return None
    rows: list[tuple[str, Callable[[MethodEvidence], Interval | None]]] = [("mean reward", _reward)]
    for opponent in dict.fromkeys(rate.opponent for group in groups for m in group.methods for rate in m.win_rates):
        rows.append((f"win rate against\n{opponent}", lambda method, who=opponent: _win_rate(method, who)))  # type: ignore[misc]
    looks = looks_of({group.methods[0].name: group.methods[0] for group in groups}.values())
    settings = [setting for setting in SIGNS if any(group.setting == setting for group in groups)]
    figure = Figure(figsize=(width, 0.5 + 2.0 * len(rows)), layout="constrained")
    for row, (title, read) in enumerate(rows):
        for column, setting in enumerate(settings):
            axes = figure.add_subplot(len(rows), len(settings), row * len(settings) + column + 1)
            shown = [group for group in groups if group.setting == setting]
            for group in shown:
                _values(axes, group, read, looks[group.methods[0].name])
            if row == 0 and len(shown) == 1:
                axes.set_title(group_name(shown[0]))
            elif row == 0:
                axes.legend(loc="lower left", handlelength=2.6)
            if column == 0:
                axes.set_ylabel(title)
            if row == len(rows) - 1:
                axes.set_xlabel(SIGNS[setting])
            ticks = sorted({value for group in shown for value in group.values})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.margins(x=0.08, y=0.2)
    return figure


def group_name(group: Ablation) -> str:
    """What the methods of a group share: family, target and the other β.

    >>> same = {"divergence": "reverse_kl", "beta_r": 0.1}
    >>> methods = [MethodEvidence("a", "exo", "reward", True, [], [], settings={**same, "beta_pi": x}) for x in (1, 2)]
    >>> group_name(Ablation("beta_pi", methods))
    'EXO, reward target, β_r 0.1'
    """
    first = group.methods[0]
    family = first.family.upper() if first.family != "other" else str(first.settings.get("divergence", "other"))
    parts = [family.replace("_", " "), *([f"{first.target} target"] if first.target else [])]
    for setting, sign in SIGNS.items():
        # β_r has no effect on a preference target.
        idle = (setting, first.target) == ("beta_r", "preference")
        if setting != group.setting and setting in first.settings and not idle:
            parts.append(f"{sign} {first.settings[setting]:g}")
    return ", ".join(parts)


def _values(axes: Axes, group: Ablation, read: Callable[[MethodEvidence], Interval | None], look: Look) -> None:
    all_values = zip(group.values, group.methods, map(read, group.methods), strict=True)
    known = [(x, method, value) for x, method, value in all_values if value is not None]
    xs, ys = np.array([x for x, _, _ in known]), np.array([value.estimate for _, _, value in known])
    axes.plot(xs, ys, **look.line, label=group_name(group), zorder=3)
    for x, method, value in known:
        if value.low is not None and value.high is not None:
            axes.vlines(x, value.low, value.high, color=look.color, linewidth=1.2, zorder=2)
        if read is _reward:
            top = value.estimate if value.high is None else value.high
            kl = f"KL {method.points[-1].kl.estimate:.2g}"
            axes.annotate(kl, (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)


def _reward(method: MethodEvidence) -> Interval | None:
    return method.points[-1].reward


def _win_rate(method: MethodEvidence, opponent: str) -> Interval | None:
    return next((rate.rate for rate in method.win_rates if rate.opponent == opponent), None)
