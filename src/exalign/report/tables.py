"""The data of the report's figures as CSV: what every mark stands on, with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exalign.evaluation.schema import Evidence
from exalign.spreadsheet import csv_text
from exalign.storage import write_text


def write_tables(evidence: Evidence, folder: Path) -> None:
    """`checkpoints.csv` (frontiers and checkpoints), `optimum.csv`, `training.csv`, `density.csv`: those with rows."""
    tables = {
        "checkpoints": _checkpoints(evidence),
        "optimum": _optimum(evidence),
        "training": _training(evidence),
        "density": _density(evidence),
    }
    for name, rows in tables.items():
        found = list(rows)
        columns = list(dict.fromkeys(column for row in found for column in row))
        if found:
            write_text(folder / f"{name}.csv", csv_text([columns, *([row.get(c) for c in columns] for row in found)]))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names; an estimate stands under its own name.

    >>> _flat({"kl": {"estimate": 1.0, "low": 0.5, "high": 1.5, "num_prompts": 8}, "step": 3})
    {'kl': 1.0, 'kl.low': 0.5, 'kl.high': 1.5, 'kl.num_prompts': 8, 'step': 3}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{prefix}{name}" if name != "estimate" or not prefix else prefix.removesuffix(".")
        flat |= _flat(value, f"{dotted}.") if isinstance(value, Mapping) else {dotted: value}
    return flat


def _checkpoints(evidence: Evidence) -> Iterator[dict[str, Any]]:
    if evidence.sft is not None:
        yield {"method": "SFT"} | _flat(asdict(evidence.sft))
    for method in evidence.methods:
        for point in method.points:
            beta = {} if method.sweep is None else {"beta": method.sweep.betas[point.step - 1]}
            yield {"method": method.name} | beta | _flat(asdict(point))


def _optimum(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for point in evidence.optimum.points if evidence.optimum else ():
        yield {"curve": "estimated optimum"} | _flat(asdict(point))
    for best in evidence.best_of_n:
        values = asdict(best)
        values.pop("win_rates")
        yield {"curve": "best of N"} | _flat(values)


def _training(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for curve in evidence.curves:
        for place, step in enumerate(curve.steps):
            yield {"stage": curve.stage, "step": step} | {name: found[place] for name, found in curve.values.items()}


def _density(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for prompt in evidence.density.prompts if evidence.density else ():
        for curve in prompt.curves:
            for place in zip(prompt.grid, curve.ratio, curve.low, curve.high, strict=True):
                names = ("log_sft", "ratio", "ratio.low", "ratio.high")
                yield {"prompt": prompt.id, "policy": curve.policy} | dict(zip(names, place, strict=True))
