"""Where a run folder keeps what the evidence is made from. Reads what is there; what is not is simply absent."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exalign.checksums import check_file, checksum
from exalign.data.record import Record
from exalign.data.store import iter_records, read_header
from exalign.errors import InputError
from exalign.evaluation.schema import Curve, Stage
from exalign.storage import read_json, read_sealed
from exalign.strict_yaml import parse_yaml

_STEP = re.compile(r"step-(\d+)")
CURVE_BUCKETS = 120


def read_recipe(run: Path) -> tuple[str, dict[str, Any]]:
    """The resolved recipe as text and as a mapping; both empty where there is none."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    values = parse_yaml(text, str(path))
    return text, values if isinstance(values, dict) else {}


def read_environment(run: Path) -> dict[str, Any]:
    """environment.json, or an empty mapping."""
    path = run / "environment.json"
    values = read_json(path) if path.is_file() else {}
    return values if isinstance(values, dict) else {"environment": values}


def complete_records(folder: Path) -> list[Record] | None:
    """The records of a complete folder, or None where it is absent or was not finished (no header)."""
    return list(iter_records(folder)) if (folder / "header.json").is_file() else None


def evaluated_steps(run: Path, method: str) -> list[tuple[int, Path]]:
    """A method's evaluated checkpoints in the order of training: step and folder of samples."""
    found = [
        (int(match[1]), folder / "samples")
        for folder in (run / "evaluation" / method).glob("step-*")
        if (match := _STEP.fullmatch(folder.name))
    ]
    return sorted(found)


def density_records(run: Path, methods: list[str]) -> dict[str, list[Record]]:
    """Per method, samples of π_sft with the final policy's log-probabilities, where they are complete."""
    found = {name: complete_records(run / "evaluation" / "density" / name / "samples") for name in methods}
    return {name: records for name, records in found.items() if records is not None}


def methods_of(run: Path, recipe: dict[str, Any]) -> list[str]:
    """Methods in the recipe's order, then any others found in `align/` or `evaluation/`, sorted."""
    in_recipe = [str(name) for section in ("align", "ppo") for name in recipe.get(section) or {}]
    trained = {path.name for path in (run / "align").glob("*") if path.is_dir()}
    evaluated = {path.parent.name for path in (run / "evaluation").glob("*/step-*") if path.is_dir()}
    there = trained | evaluated
    return [name for name in in_recipe if name in there] + sorted(there - set(in_recipe))


def is_finished(run: Path, method: str) -> bool:
    """Whether alignment came to its end: its final model is there, or it was not trained in this run at all."""
    return (run / "align" / method / "model").is_dir() or not (run / "align" / method).is_dir()


def pool_rewards(folder: Path) -> dict[str, list[float]]:
    """Rewards of every prompt's pool, reading no other column; empty where there is no complete pool.

    A missing or non-finite reward is an `InputError`.
    """
    rewards: dict[str, list[float]] = {}
    if not (folder / "header.json").is_file():
        return rewards
    for shard in sorted(folder.glob("part-*.parquet")):
        check_file(shard)
        try:
            table = pq.ParquetFile(shard).read(columns=["id", "completions.list.element.reward"])
            rows = [
                (row["id"], [completion["reward"] for completion in row["completions"]]) for row in table.to_pylist()
            ]
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(f"{shard} cannot be read ({said}); delete it and run the stage again.") from None
        for name, values in rows:
            if any(value is None or not math.isfinite(value) for value in values):
                raise InputError(f"{folder}: a completion of {name!r} has no finite reward; score it again.")
            rewards[name] = values
    return rewards


def stages(run: Path) -> list[Stage]:
    """Every finished stage but the report, which comes after, in the order in which they ended."""
    paths = set(run.glob("**/done.json")) - {run / "report" / "done.json"}
    result = []
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, str(path))):
        values = read_sealed(path)
        seconds, counted = values.get("seconds"), values.get("counts")
        counts = {k: v for k, v in counted.items() if isinstance(v, int)} if isinstance(counted, dict) else {}
        name = path.parent.relative_to(run).as_posix()
        result.append(Stage(name, float(seconds) if isinstance(seconds, int | float) else None, counts))
    return result


def record_counts(run: Path) -> dict[str, dict[str, int]]:
    """What each folder of records says was dropped or cut, where it says anything; a search's stage sums its trials."""
    found = {}
    for path in _outside_trials(run, "header.json"):
        counts = read_header(path.parent).counts
        if counts:
            found[path.parent.relative_to(run).as_posix()] = counts
    return found


def curves(run: Path, notes: Counter[str]) -> list[Curve]:
    """Training curves of every stage with metrics, each stage named by its folder; not those of a search's trials."""
    found = []
    for path in _outside_trials(run, "metrics.jsonl"):
        _check_listed(path)
        stage = path.parent.relative_to(run).as_posix()
        rows = {row["step"]: row for row in _metric_rows(path, notes)}
        if rows:
            found.append(downsample(stage, [rows[step] for step in sorted(rows)], notes))
    return found


def _check_listed(path: Path) -> None:
    """A file of a complete stage must be what the stage wrote."""
    done = path.with_name("done.json")
    files = read_sealed(done).get("files") if done.is_file() else None
    if isinstance(files, dict) and files.get(path.name) not in (None, checksum(path)):
        raise InputError(f"{path} is damaged: it is not what its stage wrote; restore it, or make the stage again.")


def _outside_trials(run: Path, name: str) -> list[Path]:
    return sorted(path for path in run.glob(f"**/{name}") if path.relative_to(run).parts[0] != "search")


def downsample(stage: str, rows: list[dict[str, float]], notes: Counter[str]) -> Curve:
    """Average consecutive rows into at most `CURVE_BUCKETS` buckets; a step logged twice counts once (the last).

    Non-finite values are left out of their bucket and counted.
    """
    names = sorted({name for row in rows for name in row if name != "step"})
    notes["skipped_training_steps"] += sum(row.get("skipped") == 1 for row in rows)
    buckets = np.array_split(np.arange(len(rows)), min(len(rows), CURVE_BUCKETS))
    values: dict[str, list[float | None]] = {}
    for name in names:
        column = np.array([row.get(name, math.nan) for row in rows])
        notes["non_finite_metric_values"] += sum(not math.isfinite(row[name]) for row in rows if name in row)
        means = []
        for bucket in buckets:
            finite = column[bucket][np.isfinite(column[bucket])]
            means.append(float(finite.mean()) if len(finite) else None)
        values[name] = means
    steps = [float(np.mean([rows[i]["step"] for i in bucket])) for bucket in buckets]
    return Curve(stage, len(rows), steps, values)


def _metric_rows(path: Path, notes: Counter[str]) -> Iterator[dict[str, float]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            # The training loop writes null for a value that was not finite.
            numbers = {k: math.nan if v is None else float(v) for k, v in row.items() if _is_number_or_none(v)}
        except (ValueError, AttributeError, OverflowError, RecursionError):
            # A kill in the middle of a write leaves half a line.
            notes["unreadable_metric_rows"] += 1
            continue
        if math.isfinite(numbers.get("step", math.nan)):
            yield numbers


def _is_number_or_none(value: Any) -> bool:
    return value is None or isinstance(value, int | float)
