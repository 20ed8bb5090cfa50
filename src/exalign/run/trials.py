"""The value of a search's trial, the best of several, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from exalign.data.store import read_records
from exalign.errors import InputError
from exalign.evaluation.frontier import path, reach, reward_at_kl
from exalign.evaluation.sample_table import tabulate
from exalign.evaluation.schema import Trial
from exalign.run.search_settings import Value
from exalign.spreadsheet import csv_text
from exalign.terminal import shown


def value_of(supervised: Path, evaluated: Path, kl: float) -> dict[str, Any]:
    """The mean reward at `kl` nats along the policies in `evaluated`, or at their reach where that is less.

    Samples that have no KL (a policy that gives its own samples no probability) are the reason of a failed trial.
    """
    steps = sorted(evaluated.glob("step-*"))
    sft = tabulate(read_records(supervised), "validation/samples")
    try:
        tables = [tabulate(read_records(step / "samples"), step.name) for step in steps]
    except InputError as error:
        return {"failed": str(error)}
    kls, rewards = path(sft, tables, sft.ids)
    at = min(kl, reach(kls, rewards))
    points = [
        {"step": int(step.name.removeprefix("step-")), "reward": float(reward), "kl": float(nats)}
        for step, reward, nats in zip(steps, rewards.mean(axis=0)[1:], kls.mean(axis=0)[1:], strict=True)
    ]
    return {"value": float(reward_at_kl(kls, rewards, at).mean()), "kl": at, "points": points}


def best_of(trials: Sequence[Trial], method: str) -> Trial:
    """The trial with the highest value, of equal ones the first; an `InputError` where every trial failed."""
    best = best_so_far(trials)
    if best is None:
        raise InputError(
            f"search/{method}: every trial failed, the first one because: {trials[0].failed} "
            f"Choose other ranges in search.methods.{method}."
        )
    return best


def best_so_far(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the highest value, of equal ones the first; None where every trial failed."""
    done = [trial for trial in trials if trial.value is not None]
    return max(done, key=lambda trial: trial.value or 0.0, default=None)


def same_as(twin: Trial, trial: Trial) -> Trial:
    """A trial that tries what its twin tried, with what came of that."""
    first = twin.number if twin.same_as is None else twin.same_as
    return replace(trial, value=twin.value, kl=twin.kl, points=twin.points, failed=twin.failed, same_as=first)


def _shown(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {v:.3g}" if isinstance(v, float) else f"{name} {v}" for name, v in values.items())


def trial_sentence(trial: Trial) -> str:
    """What is printed of a finished trial."""
    if trial.value is None:
        outcome = f"failed: {trial.failed}"
    else:
        outcome = f"reward {trial.value:.3f} at KL {trial.kl:.2f}"
    again = "" if trial.same_as is None else f" (the same as trial {trial.same_as})"
    return f"trial {trial.number}: {_shown(trial.values)}: {outcome}{again}"


def trials_table(trials: Sequence[Trial], best: Trial, title: str) -> Table:
    """What is printed of a finished search."""
    table = Table(title=title)
    for name in ("trial", "settings", "reward", "KL", "seconds"):
        table.add_column(name, justify="left" if name == "settings" else "right")
    for trial in trials:
        numbers = ("failed", "–") if trial.value is None else (f"{trial.value:.3f}", f"{trial.kl:.2f}")
        style = "bold" if trial is best else None
        number = f"{trial.number} (best)" if trial is best else str(trial.number)
        table.add_row(number, shown(_shown(trial.values)), *numbers, f"{trial.seconds:.1f}", style=style)
    return table


def trials_csv(trials: Sequence[Trial]) -> str:
    """A row per trial: its number, what was searched over, value and KL, its last policy, seconds and what failed."""
    outcome = ["value", "kl", "last_reward", "last_kl", "seconds", "same_as", "failed"]
    rows: list[list[object]] = [["trial", *trials[0].values, *outcome]]
    for t in trials:
        last = t.points[-1] if t.points else {}
        row = [t.value, t.kl, last.get("reward"), last.get("kl"), t.seconds, t.same_as, t.failed]
        rows.append([t.number, *t.values.values(), *row])
    return csv_text(rows)
