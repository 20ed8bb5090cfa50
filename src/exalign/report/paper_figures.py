"""The paper's figures and tables as files, each with what it was made from written under it.

Those of a run come from its evidence. Figures 1 and 5 and the theorems' are of the enumerable world: plain arrays in,
figures out, curves in the order given: reverse KL (EXO) first, forward KL (DPO) second, then any others.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import ArrayLike

from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import DensityRatios, Evidence, Interval, MethodEvidence
from exalign.report.figure_density import draw_density
from exalign.report.figure_frontier import CLASSIFIER, draw_frontier, draw_measure
from exalign.report.figure_steps import draw_reward_against_step
from exalign.report.style import LIGHT, WIDTH, Look, figure_style, looks_of, save_figure, write_under
from exalign.report.verdicts import BEST_OF, SCORER, WinTable, as_markdown, draw_verdicts, win_table, write_win_table
from exalign.report.wording import Captions, visible
from exalign.storage import write_text


@dataclass(frozen=True)
class Written:
    """What was written, and a sentence for each thing that is missing."""

    paths: list[Path]
    missing: list[str]


@dataclass(frozen=True)
class _Drawing:
    """One of the paper's figures: how it is called, how it is drawn, its caption, and what to do where it is None."""

    number: str
    title: str
    draw: Callable[[], Figure | None]
    caption: Callable[[], str]
    missing: str

    @property
    def name(self) -> str:
        return f"figure-{self.number}"


def write_paper_figures(evidence: Evidence, run: Path, folder: Path) -> Written:
    """Draw Figures 2, 3, 4, 6, 7, 8 and 9 and write Tables 1 and 2 of the run in folder `run` to `folder`.

    Every figure is a PNG and an SVG, the table Markdown, CSV and JSON; `figures.md` lists them with their captions.
    What the evidence does not hold is left out, with a sentence that says how to make it.
    """
    paths, missing = list[Path](), list(_unevaluated(evidence, run))
    index = [f"# Figures and tables of {visible(evidence.name)}\n"]
    for drawing in _drawings(evidence, run):
        with figure_style():
            figure = drawing.draw()
            if figure is None:
                missing.append(drawing.missing)
                continue
            write_under(figure, drawing.caption())
            save_figure(figure, folder, drawing.name)
        paths.append(folder / f"{drawing.name}.png")
        index.append(f"## Figure {drawing.number}: {drawing.title}\n\n![]({drawing.name}.png)\n\n{drawing.caption()}\n")
    if evidence.density is not None:
        texts = (" ".join(visible(prompt.prompt).split()) for prompt in evidence.density.prompts)
        index.append("Prompts:\n\n" + "\n".join(f"{i}. `{text}`" for i, text in enumerate(texts, 1)) + "\n")
    table = win_table(evidence)
    if table.cells:
        caption = Captions(evidence).win_rates()
        paths += write_win_table(table, folder, "table-1-2", caption)
        index.append(f"## Tables 1 and 2: win rates\n\n{as_markdown(table)}\n{caption}\n")
    missing += _missing_from(table, run, scored=evidence.scored)
    if missing:
        index.append("## What is missing\n\n" + "\n".join(f"- {sentence}" for sentence in missing) + "\n")
    index.append("Figures 1 and 5 are of no run: `exalign figures` draws them.\n")
    write_text(folder / "figures.md", "\n".join(index))
    return Written([*paths, folder / "figures.md"], missing)


def evaluate_command(run: Path) -> str:
    """The command that makes what evaluation lacks."""
    return f"exalign evaluate {shlex.quote(str(run / 'recipe.yaml'))} --run {shlex.quote(str(run))}"


def _drawings(evidence: Evidence, run: Path) -> Iterator[_Drawing]:
    looks, captions, again = looks_of(evidence.methods), Captions(evidence), evaluate_command(run)
    evaluated = any(method.points for method in evidence.methods)
    density, pairs = evidence.density, "" if evidence.scored else " that read held-out pairs"
    yield _Drawing(
        "2",
        "reward against KL" if evidence.scored else "accuracy on held-out preference pairs against KL",
        lambda: draw_frontier(evidence, looks, width=WIDTH) if evaluated else None,
        captions.frontier,
        f"Figure 2 needs an evaluated checkpoint{pairs}: {again} makes them.",
    )
    no_density = f"the final policies on the pool's samples: {again} evaluate.density_prompts=4 computes them."
    yield _Drawing(
        "3",
        "density ratio on one prompt",
        lambda: None if density is None else draw_density(_first(density), looks, width=WIDTH),
        lambda: captions.density(1),
        f"Figure 3 needs {no_density}",
    )
    yield _Drawing(
        "4",
        "judged match-ups",
        lambda: draw_verdicts(evidence, looks, width=WIDTH),
        captions.verdicts,
        f"Figure 4 needs judgements: exalign judge {_quoted(run)} --against METHOD --endpoint URL --model NAME asks a "
        f"language model, exalign assess new {_quoted(run)} --match METHOD:METHOD people.",
    )
    yield _Drawing(
        "6",
        "β_π and β_r",
        lambda: draw_ablation(evidence, width=WIDTH),
        captions.ablation,
        "Figure 6 needs evaluated methods that differ in beta_pi alone or in beta_r alone: add them to align in "
        f"{run / 'recipe.yaml'}, then {again} makes them.",
    )
    yield _Drawing(
        "7",
        "the classifier's accuracy against KL",
        lambda: draw_measure(evidence, looks, CLASSIFIER, width=WIDTH),
        captions.accuracy,
        "Figure 7 needs rewards that are a classifier's log-odds: with an oracle, or a classifier as evaluate.scorer, "
        "exalign evaluate RECIPE --run ANOTHER makes them.",
    )
    yield _Drawing(
        "8",
        "reward against training step",
        lambda: draw_reward_against_step(evidence, looks, width=WIDTH),
        captions.reward,
        f"Figure 8 needs an evaluated checkpoint: {again} makes them."
        if evidence.scored
        else "Figure 8 needs rewards: this run has preferences and no scorer.",
    )
    yield _Drawing(
        "9",
        "density ratio on several prompts",
        lambda: None if density is None or len(density.prompts) < 2 else draw_density(density, looks, width=WIDTH),
        lambda: captions.density(0 if density is None else len(density.prompts)),
        f"Figure 9 needs, for two prompts or more, {no_density}",
    )


def _first(density: DensityRatios) -> DensityRatios:
    return replace(density, prompts=density.prompts[:1])


def _unevaluated(evidence: Evidence, run: Path) -> Iterator[str]:
    evaluated = {method.name for method in evidence.methods if method.points}
    for name in RunFolder(run).methods_of_recipe():
        if name not in evaluated:
            yield f"{name} has no evaluated checkpoint: {evaluate_command(run)} makes it."


def _missing_from(table: WinTable, run: Path, *, scored: bool) -> Iterator[str]:
    again = evaluate_command(run)
    if not table.cells and not scored:
        yield f"Tables 1 and 2 need a scorer, which this run has not, or a judge: exalign judge {_quoted(run)}."
        return
    if not table.cells:
        yield f"Tables 1 and 2 need an evaluated checkpoint: {again} makes them."
        return
    if scored and not any(name.startswith(BEST_OF) for name in table.methods):
        yield f"Tables 1 and 2 lack best of N, which needs a pool: {again} evaluate.pool_prompts=128 draws it."
    if scored and (SCORER, "reference texts") not in table.columns:
        yield (
            "Tables 1 and 2 have no column against reference texts, which data.evaluation does not have: with data "
            "that has them, exalign evaluate RECIPE --run ANOTHER makes it."
        )
    for against, opponent in (("sft", "SFT"), ("chosen", "reference texts")):
        if not any(by != SCORER and column == opponent for by, column in table.columns):
            yield (
                f"Tables 1 and 2 have no judge's column against {opponent}: exalign judge {_quoted(run)} --against "
                f"{against} --endpoint URL --model NAME makes it."
            )


def _quoted(run: Path) -> str:
    return shlex.quote(str(run))


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
    value = "mean reward" if evidence.scored else "accuracy on\nheld-out pairs"
    rows: list[tuple[str, Callable[[MethodEvidence], Interval | None]]] = [(value, _value)]
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
    parts = [first.called, *([f"{first.target} target"] if first.target else [])]
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
        if read is _value:
            top = value.estimate if value.high is None else value.high
            kl = f"KL {method.points[-1].nats:.2g}"
            axes.annotate(kl, (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)


def _value(method: MethodEvidence) -> Interval | None:
    last = method.points[-1]
    return last.held_out.accuracy if last.held_out and not last.reward else last.reward


def _win_rate(method: MethodEvidence, opponent: str) -> Interval | None:
    return next((rate.rate for rate in method.win_rates if rate.opponent == opponent), None)


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
