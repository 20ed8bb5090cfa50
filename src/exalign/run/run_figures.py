"""`exalign figures RUN`: the paper's figures and tables from what stands in a run's directory; no model is loaded."""

from __future__ import annotations

from pathlib import Path

from exalign.errors import InputError
from exalign.evaluation.evidence import collect_evidence
from exalign.evaluation.run_folder import RunFolder, complete_records
from exalign.judging.judgements import read_judgements
from exalign.report.paper_figures import Written, evaluate_command, write_paper_figures


def draw_run_figures(run: Path, folder: Path | None = None) -> Written:
    """Draw what the run has the data for into `folder` (by default `RUN/report/figures`); see `write_paper_figures`.

    A directory that holds no run, or no samples of the supervised policy, which everything is compared with, is an
    `InputError`.
    """
    folder_of = RunFolder(Path(run))
    recipe = folder_of.recipe_values()
    if not recipe:
        raise InputError(
            f"{run} is no run's directory, for it has no recipe.yaml: exalign run RECIPE --run {run} makes one."
        )
    if complete_records(folder_of.supervised) is None:
        raise InputError(f"{run} has no samples of the supervised policy yet: {evaluate_command(run)} draws them.")
    evidence = collect_evidence(run, seed=int(recipe.get("seed") or 0), judgements=read_judgements(run))
    return write_paper_figures(evidence, run, folder_of.figures if folder is None else folder)
