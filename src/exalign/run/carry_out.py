"""A recipe carried out: by one process, or by the first of several, which the others join where all train."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from exalign.processes import calls, leading, leads
from exalign.run.preflight import check_inputs
from exalign.run.recipe import Recipe
from exalign.run.runner import Run
from exalign.run.stages import plan


def run_recipe(
    recipe: Recipe, *targets: str, folder: str | Path | None = None, redo: bool = False, recover: bool = False
) -> Run:
    """Carry out a recipe in `folder` (default `runs/NAME`) up to the stages named; see `Run` and `Run.carry_out`."""
    place: Path = Path(folder) if folder is not None else None  # type: ignore[assignment]
    run = Run(recipe, place, redo=redo, recover=recover)
    carry_out(run, *targets)
    return run


def carry_out(run: Run, *targets: str) -> None:
    """Check everything that the recipe names, then carry out the stages.

    Of several processes the first one does so, and calls the others to the stages that train.
    """
    stages = plan(run.recipe)
    if not leads():
        work = {stage.name: stage.work for stage in stages}
        for name in calls():
            work[name](run, run.path(name), Counter())
        return
    with leading():
        if not run.is_complete(stages):
            check_inputs(run.recipe)
        run.carry_out(stages, targets)
