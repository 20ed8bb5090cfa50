"""The directory of a run: where everything stands, and readers of what stands there. No other file knows these paths.

    recipe.yaml · environment.json           what was asked for, and on what it ran
    STAGE/done.json, STAGE/started.json      a stage that is complete, and one under way
    align/METHOD/                            method.json · settings.json · model · policies/step-NNNNNN · metrics.jsonl
    search/METHOD/                           best.json · trials.json · trial-…
    evaluation/prompts                       held-out prompts, with their reference texts
    evaluation/sft/samples                   samples of π_sft on them
    evaluation/METHOD/step-NNNNNN/samples    samples of every saved policy
    evaluation/answers/sft, …/METHOD/step-N  answers for win rates and judges alone, where evaluate.answers has them
    evaluation/pairs/METHOD/step-NNNNNN      held-out preference pairs with log π_θ and log π_sft
    evaluation/pool                          many samples of π_sft per prompt
    evaluation/proxy                         the same, with the rewards that methods were trained on, where others
    evaluation/drawn/…                       all of these as they were drawn, where something judges them
    evaluation/density/METHOD/samples        samples of the pool with the final policy's log π_θ
    evaluation/benchmark.json                what lm-eval measured before and after
    evaluation/evidence.json                 every number of the report
    judging/llm, assessment                  what language models and people said
    report/index.html, report/figures        the page

Reading takes what is there; what is not is simply absent.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from exalign.checksums import NAME as SUMS
from exalign.checksums import checksum
from exalign.data.record import Record
from exalign.data.store import iter_records, read_header, reading
from exalign.errors import InputError
from exalign.evaluation.schema import (
    Benchmark,
    Curve,
    Evidence,
    MethodEvidence,
    Search,
    Stage,
    Sweep,
    Trial,
    read_evidence,
)
from exalign.storage import exists, read_json, read_sealed
from exalign.strict_yaml import parse_yaml

DONE = "done.json"
SUPERVISED, REFERENCE = "sft", "reference"
"""What the supervised policy and the reference texts are called among the systems of a run."""
NO_METHODS = (SUPERVISED, "prompts", "drawn", "pool", "proxy", "density", "pairs", "answers")
"""Folders of `evaluation/` that belong to no method."""
BEST_OF = "best-of-"
"""With N behind it, the best of N samples of the supervised policy among the systems of a run."""
DRAWN = "evaluation/drawn/"
"""Before the name below `evaluation/` of what is judged there, with the same counts."""
CURVE_BUCKETS = 120
_STEP = re.compile(r"step-(\d+)")


class RunFolder:
    """A run's directory. Attributes and methods without a verb are places, whether anything stands there or not."""

    def __init__(self, path: Path, stages: Collection[str] | None = None) -> None:
        """`stages` are those that count, by name, where others may be left of an earlier recipe; None: all."""
        self.path, self._stages = path, stages
        self.recipe, self.environment = path / "recipe.yaml", path / "environment.json"
        self.evaluation = path / "evaluation"
        self.evidence, self.benchmark = self.evaluation / "evidence.json", self.evaluation / "benchmark.json"
        self.prompts = self.evaluation / "prompts"
        self.pool, self.proxy = self.evaluation / "pool", self.evaluation / "proxy"
        self.supervised = self.evaluation / SUPERVISED / "samples"
        self.judgements = path / "judging" / "llm"
        self.assessment = path / "assessment"
        self.studies = self.assessment / "study.sqlite"
        self.report = path / "report"
        self.page, self.figures = self.report / "index.html", self.report / "figures"

    def align(self, method: str) -> Path:
        return self.path / "align" / method

    def model(self, method: str) -> Path:
        return self.align(method) / "model"

    def policy(self, method: str, step: int) -> Path:
        return self.align(method) / "policies" / step_name(step)

    def policy_source(self, name: str) -> str | None:
        """Folder or hub name of `SFT`, or of a policy METHOD@STEP; None where the run began with random weights."""
        method, _, step = name.rpartition("@")
        if method:
            folder = self.policy(method, int(step))
            return trained_elsewhere(folder) or str(folder)
        trained = self.path / SUPERVISED / "model"
        return str(trained) if trained.is_dir() else (self.recipe_values().get("model") or {}).get("source")

    def ships(self, method: str, step: int) -> str:
        """What to load to have the policy of a step: its folder in the run, or where it was trained."""
        folder = self.policy(method, step)
        return trained_elsewhere(folder) or self.relative(folder)

    def description(self, method: str) -> Path:
        return self.align(method) / "method.json"

    def search(self, method: str) -> Path:
        return self.path / "search" / method

    def samples(self, method: str, step: int) -> Path:
        return self.evaluation / method / step_name(step) / "samples"

    def answered(self, samples: Path) -> Path:
        """What win rates, judges and people take in the place of these samples of a policy; often these themselves."""
        own = (self.recipe_values().get("evaluate") or {}).get("answers")
        return samples if own is None else self.evaluation / "answers" / samples.relative_to(self.evaluation)

    def pairs(self, method: str, step: int) -> Path:
        return self.evaluation / "pairs" / method / step_name(step)

    def density(self, method: str) -> Path:
        return self.evaluation / "density" / method / "samples"

    def relative(self, path: Path) -> str:
        """A place in the run as messages and the report name it."""
        return path.relative_to(self.path).as_posix()

    def recipe_text(self) -> str:
        return self.recipe.read_text(encoding="utf-8", errors="replace") if self.recipe.is_file() else ""

    def recipe_values(self) -> dict[str, Any]:
        values = parse_yaml(self.recipe_text(), str(self.recipe))
        return values if isinstance(values, dict) else {}

    def environment_values(self) -> dict[str, Any]:
        values = read_json(self.environment) if self.environment.is_file() else {}
        return values if isinstance(values, dict) else {"environment": values}

    def check(self) -> None:
        """An `InputError` where there is no such folder at all."""
        if not exists(self.path):
            raise InputError(f"There is no folder {self.path}.")

    def read_evidence(self) -> Evidence:
        """The evidence of an evaluated run; an `InputError` where it has none."""
        self.check()
        if not self.evidence.is_file():
            raise InputError(f"{self.path} has no evidence; finish it with exalign run RECIPE --run {self.path}.")
        return read_evidence(self.evidence)

    def read_benchmark(self) -> Benchmark | None:
        """What lm-eval measured of the run's policies; None where it was not asked."""
        if not self.benchmark.is_file():
            return None
        try:
            found = TypeAdapter(Benchmark).validate_python(read_sealed(self.benchmark))
        except ValidationError:
            raise InputError(f"{self.benchmark} is not of a format that this exalign reads; benchmark again.") from None
        return replace(found, outdated=[name for name, known in found.sums.items() if self.policy_sum(name) != known])

    def policy_sum(self, name: str) -> str:
        """The checksum of a policy's list of checksums, by the names of `policy_source`; empty where it has none."""
        sums = Path(self.policy_source(name) or "") / SUMS
        return checksum(sums) if sums.is_file() else ""

    def counts(self, stage: Path) -> bool:
        """Whether what stands in a stage's folder is of the stages that count."""
        return self._stages is None or self.relative(stage) in self._stages

    def methods(self) -> list[str]:
        """Methods in the recipe's order, then any others found in `align/` or `evaluation/`, where all count."""
        in_recipe = self.methods_of_recipe()
        there = {path.name for path in (self.path / "align").glob("*") if path.is_dir()} | set(self.evaluated())
        others = sorted(there - set(in_recipe)) if self._stages is None else []
        return [name for name in in_recipe if name in there] + others

    def methods_of_recipe(self) -> list[str]:
        return [str(name) for name in self.recipe_values().get("align") or {}]

    def evaluated(self) -> list[str]:
        """Methods of which samples were drawn, or pairs read, sorted."""
        folders = [*self.evaluation.glob("*/step-*"), *self.evaluation.glob("pairs/*/step-*")]
        return sorted({path.parent.name for path in folders if path.is_dir()})

    def describe(self, method: str) -> tuple[MethodEvidence, float | None]:
        """What the method says of itself, before anything is measured, and β of the optimum that it aims at.

        Its name alone where its folder is not there.
        """
        nothing: dict[str, Any] = {"label": method, "family": "other", "target": None, "settings": {}}
        values = read_json(self.description(method)) if self.description(method).is_file() else nothing
        try:
            own = {name: values[name] for name in nothing} | {"line": values.get("line", "")}
            if (sweep := values.get("sweep")) is not None:
                points = sweep["points"]
                own["sweep"] = Sweep(sweep["setting"], [p["value"] for p in points], [p["beta"] for p in points])
            finished = self.model(method).is_dir() or not self.align(method).is_dir()  # else training was stopped
            found = MethodEvidence(method, finished=finished, points=[], win_rates=[], **own)
            return found, values.get("beta")
        except (TypeError, KeyError, AttributeError):
            raise InputError(f"{self.description(method)} does not describe a method; make align again.") from None

    def sampled_steps(self, method: str) -> list[int]:
        return _steps(self.evaluation / method)

    def paired_steps(self, method: str) -> list[int]:
        """The checkpoints that read the held-out pairs, in the order of training."""
        return _steps(self.evaluation / "pairs" / method)

    def answers(self, system: str) -> Path:
        """The answers of `sft`, `reference` (the reference texts), METHOD (its last step) or METHOD@STEP.

        What the run does not have is an `InputError` that says what it has.
        """
        method, _, wanted = system.partition("@")
        if system in (SUPERVISED, REFERENCE):
            found = self.answered(self.supervised) if system == SUPERVISED else self.prompts
        else:
            steps = [] if method in NO_METHODS else self.sampled_steps(method)
            steps = [step for step in steps if str(step) == wanted.lstrip("0")] if wanted else steps[-1:]
            found = self.answered(self.samples(method, steps[0] if steps else 0))
        if not found.is_dir():
            self.check()
            known = [SUPERVISED] if self.supervised.is_dir() else []
            known += [name for name in self.evaluated() if self.sampled_steps(name)]
            raise InputError(
                f"{self.path} has no evaluation samples of {system}; evaluated there: {', '.join(known) or 'nothing'}."
            )
        return found

    @classmethod
    def around(cls, path: Path) -> tuple[RunFolder, str | None]:
        """The run that `path` is, or lies in (`RUN/evaluation/METHOD`, or a step of it), and the system it names there.

        The name is one that `answers` takes; None for a whole run. Neither is an `InputError`.
        """
        if cls(path).evaluation.is_dir():
            return cls(path), None
        parts = path.resolve().parts
        if "evaluation" not in parts[:-1]:
            raise InputError(f"{path} is no run directory with evaluation samples, nor a folder below RUN/evaluation.")
        depth = len(parts) - 1 - parts[::-1].index("evaluation")
        named = [part for part in parts[depth + 1 :] if part != "samples"]
        names = (str(int(step[1])) if (step := _STEP.fullmatch(part)) else part for part in named)
        return cls(Path(*parts[:depth])), "@".join(names)

    def searches(self) -> list[Search]:
        found = []
        for method in self.methods():
            best = self.search(method) / "best.json"
            if best.is_file():
                values, listed = read_json(best), read_sealed(self.search(method) / "trials.json")
                try:
                    trials = [Trial(**trial) for trial in listed["trials"]]
                    found.append(Search(method, values["ranked_at"], values["trial"], trials))
                except (TypeError, KeyError):
                    raise InputError(f"{best.parent} does not hold a search; make search/{method} again.") from None
        return found

    def stages(self) -> list[Stage]:
        """Every finished stage but the report, which comes after, in the order in which they ended."""
        paths = set(self.path.glob(f"**/{DONE}")) - {self.report / DONE}
        ended = sorted(paths, key=lambda path: (path.stat().st_mtime_ns, str(path)))
        found = {self.relative(path.parent): read_sealed(path) for path in ended}
        return [Stage(name, values.get("seconds"), values.get("counts", {})) for name, values in found.items()]

    def record_counts(self) -> dict[str, dict[str, int]]:
        """What each folder of records says was dropped or cut; a search's stage sums its trials."""
        headers = {self.relative(path.parent): path.parent for path in self._outside_trials("header.json")}
        listed = {name: read_header(folder).counts for name, folder in headers.items()}
        return {name: counts for name, counts in listed.items() if counts and not name.startswith(DRAWN)}

    def curves(self, notes: Counter[str]) -> list[Curve]:
        """Training curves of every stage with metrics, each named by its folder; not those of a search's trials.

        Of `align/` those of `methods`.
        """
        found, methods = [], self.methods()
        for path in self._outside_trials("metrics.jsonl"):
            kind, *names = path.relative_to(self.path).parts
            if kind == "align" and names[0] not in methods:
                continue
            _check_listed(path)
            rows = {row["step"]: row for row in _metric_rows(path, notes)}
            if rows:
                found.append(downsample(self.relative(path.parent), [rows[step] for step in sorted(rows)], notes))
        return found

    def _outside_trials(self, name: str) -> list[Path]:
        return sorted(path for path in self.path.glob(f"**/{name}") if path.relative_to(self.path).parts[0] != "search")


def trained_elsewhere(folder: Path) -> str | None:
    """Folder or hub name of a policy that the run did not train; None of its own."""
    file = folder / "source.json"
    return str(read_json(file)["source"]) if file.is_file() else None


def step_name(step: int) -> str:
    """The folder of a checkpoint.

    >>> step_name(40)
    'step-000040'
    """
    return f"step-{step:06d}"


def complete_records(folder: Path) -> list[Record] | None:
    """The records of a complete folder, or None where it is absent or was not finished (no header)."""
    return list(iter_records(folder)) if (folder / "header.json").is_file() else None


def pool_rewards(folder: Path) -> dict[str, list[float]]:
    """Rewards of every prompt's pool, reading no other column; empty where there is no complete pool.

    A missing or non-finite reward is an `InputError`.
    """
    rewards: dict[str, list[float]] = {}
    if not (folder / "header.json").is_file():
        return rewards
    for shard in sorted(folder.glob("part-*.parquet")):
        with reading(shard):
            table = pq.ParquetFile(shard).read(columns=["id", "completions.list.element.reward"])
            rows = [(row["id"], [one["reward"] for one in row["completions"]]) for row in table.to_pylist()]
        for name, values in rows:
            if any(value is None or not math.isfinite(value) for value in values):
                raise InputError(f"{folder}: a completion of {name!r} has no finite reward; score it again.")
            rewards[name] = values
    return rewards


def _check_listed(path: Path) -> None:
    """A file of a complete stage must be what the stage wrote."""
    done = path.with_name(DONE)
    files = read_sealed(done).get("files") if done.is_file() else None
    if isinstance(files, dict) and path.name in files and files[path.name][-1] != checksum(path):
        raise InputError(f"{path} is damaged: it is not what its stage wrote; restore it, or make the stage again.")


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
            known = {k: v for k, v in row.items() if v is None or isinstance(v, int | float)}
            numbers = {k: math.nan if v is None else float(v) for k, v in known.items()}
        except (ValueError, AttributeError, OverflowError, RecursionError):
            # A kill in the middle of a write leaves half a line.
            notes["unreadable_metric_rows"] += 1
            continue
        if math.isfinite(numbers.get("step", math.nan)):
            yield numbers


def _steps(folder: Path) -> list[int]:
    return sorted(int(match[1]) for path in folder.glob("step-*") if (match := _STEP.fullmatch(path.name)))
