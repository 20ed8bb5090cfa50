"""The paper's figures and tables as files, from a run's evidence, each with what it was made from written under it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import DensityRatios, Evidence
from exalign.report.captions import Captions
from exalign.report.figure_ablation import draw_ablation
from exalign.report.figure_density import draw_density
from exalign.report.figure_frontier import draw_accuracy_frontier, draw_frontier
from exalign.report.figure_reward import draw_reward_against_step
from exalign.report.figure_verdicts import draw_verdicts
from exalign.report.style import figure_style, looks_of
from exalign.report.svg import WIDTH, save_figure, write_under
from exalign.report.win_table import SCORER, WinTable, as_markdown, win_table, write_win_table
from exalign.report.wording import visible
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
    missing += _missing_from(table, run)
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
    density = evidence.density
    yield _Drawing(
        "2",
        "reward against KL",
        lambda: draw_frontier(evidence, looks, width=WIDTH) if evaluated else None,
        captions.frontier,
        f"Figure 2 needs an evaluated checkpoint: {again} makes them.",
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
        lambda: draw_accuracy_frontier(evidence, looks, width=WIDTH),
        captions.accuracy,
        "Figure 7 needs rewards that are a classifier's log-odds: with an oracle, or a classifier as evaluate.scorer, "
        "exalign evaluate RECIPE --run ANOTHER makes them.",
    )
    yield _Drawing(
        "8",
        "reward against training step",
        lambda: draw_reward_against_step(evidence, looks, width=WIDTH),
        captions.reward,
        f"Figure 8 needs an evaluated checkpoint: {again} makes them.",
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


def _missing_from(table: WinTable, run: Path) -> Iterator[str]:
    again = evaluate_command(run)
    if not table.cells:
        yield f"Tables 1 and 2 need an evaluated checkpoint: {again} makes them."
        return
    if not any(name.startswith("best of ") for name in table.methods):
        yield f"Tables 1 and 2 lack best of N, which needs a pool: {again} evaluate.pool_prompts=128 draws it."
    if (SCORER, "reference texts") not in table.columns:
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
