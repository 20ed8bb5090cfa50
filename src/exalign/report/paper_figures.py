"""The paper's figures and tables as files, each with what it was made from written under it.

Those of a run come from its evidence. Figures 1 and 5 and the theorems' are of the enumerable world: plain arrays in,
figures out, curves in the order given: reverse KL (EXO) first, forward KL (DPO) second, then any others.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import ArrayLike

from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Evidence, Interval, MethodEvidence
from exalign.report.figures import CLASSIFIER, draw_density, draw_frontier, draw_reward_against_step
from exalign.report.style import LIGHT, WIDTH, Look, figure_style, looks_of, save_figure, vertical_bar
from exalign.report.verdicts import (
    BEST_OF,
    SCORER,
    WinTable,
    as_markdown,
    draw_verdicts,
    in_one_line,
    judged_tallies,
    win_table,
    write_win_table,
)
from exalign.report.wording import SIGNS, Captions, code, describe, number, visible
from exalign.storage import write_text


def write_paper_figures(evidence: Evidence, run: Path, folder: Path) -> tuple[list[Path], list[str]]:
    """Draw Figures 2, 3, 4, 6, 7, 8 and 9 and write Tables 1 and 2 of the run in folder `run` to `folder`.

    Every figure is a PNG and an SVG, the table Markdown, CSV and JSON; `figures.md` lists them with their captions.
    What the evidence does not hold is left out. Returns what was written, and for each thing that is missing a sentence
    that says how to make it.
    """
    paths, missing = list[Path](), list(_unevaluated(evidence, run))
    index = [f"# Figures and tables of {visible(evidence.name)}\n"]
    with figure_style():
        for number, (title, figure, caption, lacking) in _figures(evidence, run).items():
            if figure is None:
                missing.append(f"Figure {number} needs {lacking}")
                continue
            name, said = f"figure-{number}", caption()
            paths.append(save_figure(figure, folder, name, said))
            index.append(f"## Figure {number}: {title}\n\n![]({name}.png)\n\n{said}\n")
    if evidence.density is not None:
        listed = (f"{i}. {code(prompt.prompt)}\n" for i, prompt in enumerate(evidence.density.prompts, 1))
        index.append("Prompts:\n\n" + "".join(listed))
    table = win_table(evidence)
    if table.cells:
        said = Captions(evidence).win_rates()
        paths += write_win_table(table, folder, "table-1-2", said)
        index.append(f"## Tables 1 and 2: win rates\n\n{as_markdown(table)}\n{said}\n")
    missing += _missing_from(table, run, {judge for judge, _ in judged_tallies(evidence)}, scored=evidence.scored)
    if missing:
        index.append("## What is missing\n\n" + "\n".join(f"- {sentence}" for sentence in missing) + "\n")
    index.append("Figures 1 and 5 are of no run: `exalign figures` draws them.\n")
    write_text(folder / "figures.md", "\n".join(index))
    return [*paths, folder / "figures.md"], missing


def evaluate_command(run: Path) -> str:
    """The command that makes what evaluation lacks."""
    return f"exalign evaluate {shlex.quote(str(run / 'recipe.yaml'))} --run {shlex.quote(str(run))}"


def _figures(evidence: Evidence, run: Path) -> dict[str, tuple[str, Figure | None, Callable[[], str], str]]:
    """Every figure's title, drawing and caption by its number in the paper, and what it needs where it is None."""
    looks, captions, again = looks_of(evidence.methods), Captions(evidence), evaluate_command(run)
    evaluated = any(method.points for method in evidence.methods)
    density = evidence.density
    first = None if density is None else replace(density, prompts=density.prompts[:1])
    several = None if density is None or len(density.prompts) < 2 else density
    no_scorer = "rewards: this run has preferences and no scorer."
    no_density = f"the final policies on the pool's samples: {again} evaluate.density_prompts=4 computes them."
    pairs = "" if evidence.scored else " that read held-out pairs"
    return {
        "2": (
            "reward against KL" if evidence.scored else "accuracy on held-out preference pairs against KL",
            draw_frontier(evidence, looks, width=WIDTH) if evaluated else None,
            captions.frontier,
            f"an evaluated checkpoint{pairs}: {again} makes them.",
        ),
        "3": (
            "density ratio on one prompt",
            draw_density(first, looks, width=WIDTH),
            lambda: captions.density(1),
            no_density if evidence.scored else no_scorer,
        ),
        "4": (
            "judged match-ups",
            draw_verdicts(evidence, looks, width=WIDTH),
            captions.verdicts,
            f"judgements: exalign judge {_quoted(run)} --against METHOD --endpoint URL --model NAME asks a language "
            f"model, exalign assess new {_quoted(run)} --match METHOD:METHOD people.",
        ),
        "6": (
            "β_π and β_r",
            draw_ablation(evidence, width=WIDTH),
            captions.ablation,
            "evaluated methods that differ in beta_pi alone or in beta_r alone: add them to align in "
            f"{run / 'recipe.yaml'}, then {again} makes them.",
        ),
        "7": (
            "the classifier's accuracy against KL",
            draw_frontier(evidence, looks, CLASSIFIER, width=WIDTH),
            captions.accuracy,
            "rewards that are a classifier's log-odds: with an oracle, or a classifier as evaluate.scorer, exalign "
            "evaluate RECIPE --run ANOTHER makes them.",
        ),
        "8": (
            "reward against training step",
            draw_reward_against_step(evidence, looks, width=WIDTH),
            captions.reward,
            f"an evaluated checkpoint: {again} makes them." if evidence.scored else no_scorer,
        ),
        "9": (
            "density ratio on several prompts",
            draw_density(several, looks, width=WIDTH),
            lambda: captions.density(0 if several is None else len(several.prompts)),
            f"two prompts or more, and {no_density}" if evidence.scored else no_scorer,
        ),
    }


def _unevaluated(evidence: Evidence, run: Path) -> Iterator[str]:
    evaluated = {method.name for method in evidence.methods if method.points}
    for name in RunFolder(run).methods_of_recipe():
        if name not in evaluated:
            yield f"{name} has no evaluated checkpoint: {evaluate_command(run)} makes it."


def _missing_from(table: WinTable, run: Path, judges: Collection[str], *, scored: bool) -> Iterator[str]:
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
        if not any(by in judges and column == opponent for by, column in table.columns):
            yield (
                f"Tables 1 and 2 have no judge's column against {opponent}: exalign judge {_quoted(run)} --against "
                f"{against} --endpoint URL --model NAME makes it."
            )


def _quoted(run: Path) -> str:
    return shlex.quote(str(run))


@dataclass(frozen=True)
class Ablation:
    """Evaluated methods in the order of the one setting in which they differ."""

    setting: str
    methods: list[MethodEvidence]

    @property
    def values(self) -> list[float]:
        return [float(method.settings[self.setting]) for method in self.methods]

    @property
    def name(self) -> str:
        return describe(self.methods[0], without=self.setting)


def ablations(methods: Sequence[MethodEvidence]) -> list[Ablation]:
    """The largest groups of methods that differ in β_π alone, or in β_r alone, each with at least two values."""
    found = []
    for setting in ("beta_pi", "beta_r"):

        def others(method: MethodEvidence, setting: str = setting) -> str:
            return repr(sorted((key, value) for key, value in method.settings.items() if key != setting))

        able = [m for m in methods if m.points and isinstance(m.settings.get(setting), int | float)]
        for _, group in groupby(sorted(able, key=others), key=others):
            ordered = sorted(group, key=lambda method: method.settings[setting])
            if len({method.settings[setting] for method in ordered}) > 1:
                found.append(Ablation(setting, ordered))
    return found


_ROW_LETTERS = 28
"""For which a row of that figure has room in its height."""


def draw_ablation(evidence: Evidence, *, width: float) -> Figure | None:
    """Reward and win rates at each method's end against β_π (left) and β_r (right); None without such methods.

    The win rates are the scorer's and every judge's. The KL at which a reward was reached stands above it.
    """
    groups = ablations(evidence.methods)
    if not groups:
        return None
    varied = {method.name: method for group in groups for method in group.methods}
    ends = {name: end for name, method in varied.items() if (end := method.points[-1].measured)}
    rows = [("mean reward" if evidence.scored else "accuracy on\nheld-out pairs", ends)]
    table = win_table(evidence)
    for by, opponent in table.columns:
        won = {name: cell.won.rate for name in varied if (cell := table.cell(name, (by, opponent)))}
        if won:
            judge = [] if by == SCORER else textwrap.wrap(in_one_line(by), _ROW_LETTERS)
            rows.append(("\n".join([*judge, "win rate against", opponent]), won))
    looks = looks_of({group.methods[0].name: group.methods[0] for group in groups}.values())
    settings = list(dict.fromkeys(group.setting for group in groups))
    figure = Figure(figsize=(width, 0.5 + 2.0 * len(rows)), layout="constrained")
    top: list[Axes | None] = [None] * len(settings)
    for row, (title, known) in enumerate(rows):
        for column, setting in enumerate(settings):
            place = row * len(settings) + column + 1
            axes = figure.add_subplot(len(rows), len(settings), place, sharex=top[column])
            top[column] = top[column] or axes
            shown = [group for group in groups if group.setting == setting]
            for group in shown:
                _values(axes, group, known, looks[group.methods[0].name], nats=row == 0)
            if row == 0 and len(shown) == 1:
                axes.set_title(shown[0].name)
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


def _values(axes: Axes, group: Ablation, known: Mapping[str, Interval], look: Look, *, nats: bool) -> None:
    """What is `known` of the group's methods, with the KL of their ends where `nats` says so."""
    shown = [(x, m, known[m.name]) for x, m in zip(group.values, group.methods, strict=True) if m.name in known]
    axes.plot([x for x, *_ in shown], [value.estimate for *_, value in shown], **look.line, label=group.name, zorder=3)
    for x, method, value in shown:
        vertical_bar(axes, x, value, look.color, linewidth=1.2, zorder=2)
        if nats:
            last = method.points[-1]
            kl = "no KL" if last.kl is None else f"KL {number(last.nats, 2)}"
            axes.annotate(kl, (x, value.ends[1]), (0, 3), textcoords="offset points", ha="center", fontsize=7)


_STYLES: list[dict[str, Any]] = [
    {"color": LIGHT["exo-1"], "linestyle": "-", "marker": "o"},
    {"color": LIGHT["dpo-1"], "linestyle": "--", "marker": "s"},
    {"color": LIGHT["other-1"], "linestyle": "-.", "marker": "^"},
    {"color": LIGHT["other-2"], "linestyle": (0, (1, 1.2)), "marker": "v"},
    {"color": LIGHT["other-3"], "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "P"},
    {"color": LIGHT["exo-3"], "linestyle": (0, (8, 2)), "marker": "H"},
]
_NARROWER = 7.6
_ERRORS = (("bias of the gradient", -1.0, "bias"), ("its root mean square error", -0.5, "rms"))
"""Panels of errors against K: a title, the slope that theory gives, and which error it is."""


def draw_divergences(
    points: ArrayLike, target: ArrayLike, policies: Mapping[str, ArrayLike], reference: ArrayLike | None = None
) -> Figure:
    """What minimising each divergence makes of a two-mode target when the policy can hold one mode (Figure 1).

    One panel per divergence. `points` `[N]` lie on the horizontal axis; `target`, `reference` (π_sft) and each of
    `policies` are densities `[N]`.
    """
    columns = min(len(policies), 3)
    rows = -(-len(policies) // columns)
    with figure_style():
        figure = Figure(figsize=(_NARROWER, 0.5 + 1.9 * rows), layout="constrained")
        panels = [axes for row in figure.subplots(rows, columns, sharey=True, squeeze=False) for axes in row]
        for axes in panels[len(policies) :]:
            axes.remove()
        for axes, (name, density), style in zip(panels, policies.items(), cycle(_STYLES), strict=False):
            axes.fill_between(points, target, color=LIGHT["muted"], alpha=0.3, linewidth=0, label="target π*")
            if reference is not None:
                axes.plot(points, reference, color=LIGHT["muted"], linewidth=1.0, linestyle=(0, (1, 2)), label="π_sft")
            axes.plot(points, density, **{**style, "marker": "", "linestyle": "-"}, label="policy")
            axes.set_title(name)
            axes.margins(x=0)
        panels[0].set_ylim(bottom=0)
        panels[0].legend(loc="upper right")
        figure.supxlabel("outcome", fontsize=9)
        figure.supylabel("density", fontsize=9)
    return figure


def draw_error_against_k(curves: Mapping[str, Any]) -> Figure:
    """Bias and root mean square error of K-sample gradients against K on log-log axes (Theorems 3.2, 3.3).

    `curves` are `exact.convergence.GradientErrors` of the same sizes K. An error that is not above 0 has no place on
    such axes and is left out, and so is a curve whose errors are nowhere above their noise.
    """
    with figure_style():
        figure = Figure(figsize=(_NARROWER, 3.4), layout="constrained")
        for place, (title, slope, kind) in enumerate(_ERRORS, start=1):
            axes = figure.add_subplot(1, len(_ERRORS), place)
            axes.set_title(title)
            parts = ("num_completions", kind, f"{kind}_error")
            found = {name: np.array([getattr(one, part) for part in parts]) for name, one in curves.items()}
            _errors(axes, {name: rows for name, rows in found.items() if (rows[1] > 4 * rows[2]).any()}, slope)
        figure.axes[0].set_ylabel("error of the gradient")
    return figure


def _errors(axes: Axes, curves: Mapping[str, np.ndarray], slope: float) -> None:
    """`curves` have rows K, error, and its standard error."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    top = 0.0
    for (name, rows), style in zip(curves.items(), cycle(_STYLES), strict=False):
        ks = rows[0]
        shown, errors, spread = rows[:, rows[1] > 0]
        axes.plot(shown, errors, label=name, markersize=4, **style)
        top = max(top, float(errors[0] * (shown[0] / ks[0]) ** -slope))
        # An arm that would reach 0 ends at a tenth of the error: log axes have no 0.
        low = np.maximum(errors - 1.96 * spread, errors / 10)
        axes.vlines(shown, low, errors + 1.96 * spread, color=style["color"], linewidth=0.8, alpha=0.6)
    guide = 1.5 * top * (ks / ks[0]) ** slope
    label = f"slope {slope:g}".replace("-", "−")
    axes.plot(ks, guide, color=LIGHT["muted"], linewidth=1.0, linestyle=(0, (1, 2)), label=label)
    axes.set_xticks(ks, [f"{k:g}" for k in ks])
    bottom, ceiling = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ceiling < 100 * bottom else (1,)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("completions per prompt, K")
    axes.legend(loc="lower left")
