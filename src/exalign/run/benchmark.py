"""What alignment did to other tasks: lm-eval (EleutherAI's harness) on each policy and on what it started from."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from exalign.errors import InputError, first_line
from exalign.evaluation.evidence import SFT
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Benchmark, BenchmarkRow, Interval
from exalign.models.loading import load_policy, load_tokenizer
from exalign.models.model_settings import ModelSettings
from exalign.report.wording import interval, plus_minus
from exalign.run.materials import ready
from exalign.run.publish import chosen
from exalign.storage import write_sealed
from exalign.terminal import shown

Measure = Callable[[ModelSettings], Mapping[str, Any]]
"""From where a model is to what lm-eval finds on the tasks."""
Z = 1.96
"""Standard errors from the middle of a 95 % interval to its ends."""


def find_tasks(names: str, include: Path | None, **how: Any) -> Measure:
    """What measures the tasks named with commas between, of lm-eval and of the folder `include`; their data is read.

    `how` is lm-eval's own: `limit`, `num_fewshot`, `apply_chat_template`.

    A missing harness, an unknown task, and tasks that cannot be read are `InputError`s.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise InputError(f"benchmark needs {error.name}: pip install 'exalign[lm-eval]'.") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, wanted = TaskManager(include_path=include), list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        if name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks)) or "none of a name like that"
            where = "" if include is None else f" or of {include}"
            raise InputError(
                f"{name[:100]!r} is no task of lm-eval{where}, where there is {near}; --include-path DIR adds your own."
            )
    try:
        manager.load(wanted)
    except Exception as error:  # whatever reads the data: datasets, the hub's client, code that comes with a task
        raise InputError(f"{', '.join(wanted)} cannot be read: {first_line(error)[:300]}") from None

    def measure(settings: ModelSettings) -> Mapping[str, Any]:
        tokenizer = load_tokenizer(str(settings.source), trust_remote_code=settings.trust_remote_code)
        model = ready(load_policy(settings, tokenizer))  # ours: never from a pickle, with adapters in their base
        templated = how.get("apply_chat_template", False)
        if templated and tokenizer.chat_template is None:
            raise InputError(f"{settings.source} has no chat template; leave out --chat-template.")
        asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1 if model.device.type == "cpu" else "auto")
        found = simple_evaluate(asked, tasks=wanted, task_manager=manager, **how) or {}
        return found | {"templated": templated}

    return measure


def benchmark_run(run: RunFolder, method: str | None, find: Callable[[], Measure]) -> Benchmark:
    """Every method of a run, or one, at the checkpoint that its report ships, else its last, against π_sft.

    It is written to `evaluation/benchmark.json` in the place of what stood there. A run without evidence or without a
    π_sft to load, and an unknown method, are `InputError`s, before tasks are looked for.
    """
    evidence, settings = run.read_evidence(), ModelSettings.model_validate(run.recipe_values()["model"])
    methods = [each.name for each in evidence.methods if each.points] if method is None else [method]
    names = [SFT, *(f"{name}@{chosen(evidence, name)[1].step}" for name in methods)]
    if run.policy_source(SFT) is None:
        raise InputError(f"{run.path} began with random weights: there is no supervised policy to compare with.")
    plain = settings.model_copy(update={"config": None, "lora": None})
    models = {name: plain.model_copy(update={"source": run.policy_source(name)}) for name in names}
    found = compare(find(), models.pop(SFT), models, {name: run.policy_sum(name) for name in names})
    write_sealed(run.benchmark, asdict(found))
    return found


def compare(
    measure: Measure, before: ModelSettings | None, after: Mapping[str, ModelSettings], sums: dict[str, str]
) -> Benchmark:
    """Models by name, each against the one `before` where there is one."""
    start = None if before is None else measure(before)
    found = {name: measure(settings) for name, settings in after.items()}
    rows = [row for name, results in found.items() for row in _rows(name, start, results)]
    any_of = next(iter(found.values()))
    shots = sorted(set(any_of["n-shot"].values()))
    how = f"{'–'.join(map(str, {shots[0]: 0, shots[-1]: 0}))} examples before each question"
    template = ", through the chat template" if any_of["templated"] else ""
    return Benchmark(f"lm-eval {any_of['lm_eval_version']}, {how}{template}", any_of["config"]["limit"], rows, sums)


def benchmark_table(found: Benchmark) -> Table:
    """For a terminal: before and after with standard errors, and the difference with its interval."""
    compared = found.rows[0].before is not None
    limit = "" if found.limit is None else f", the first {found.limit:,} documents of each task"
    how = "; in brackets 95 % intervals, of differences by document unless not paired" if compared else ""
    table = Table(
        title="What was lost" if compared else None, caption=f"{found.harness}{limit}; ± standard errors{how}"
    )
    for head in ("", "task, metric", *(("before", "after", "difference") if compared else ("value",))):
        table.add_column(head, overflow="fold")
    for row in found.rows:
        told = f"{interval(row.difference)}{'' if row.paired else ', not paired'}: {row.outcome}"
        values = [plus_minus(row.before), plus_minus(row.after), told] if compared else [plus_minus(row.after)]
        table.add_row(*map(shown, (row.policy, f"{row.task}, {row.metric}", *values)))
    return table


class _Score(NamedTuple):
    """`by_document` is empty where the value is not the mean over documents."""

    value: float
    stderr: float | None
    by_document: dict[tuple[str, int], float]


def _rows(policy: str, before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[BenchmarkRow]:
    for task, values in after["results"].items():
        for name in values:
            metric, comma, kept = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(values[name], int | float):
                continue
            ours, theirs = _score(after, task, name), None if before is None else _score(before, task, name)
            difference, paired = (None, False) if theirs is None else _difference(theirs, ours, values["sample_len"])
            yield BenchmarkRow(
                policy=policy,
                task=task,
                metric=metric if kept == "none" else f"{metric}, {kept}",
                higher_is_better=after["higher_is_better"].get(task, {}).get(metric),
                after=(ours.value, ours.stderr),
                before=None if theirs is None else (theirs.value, theirs.stderr),
                difference=difference,
                paired=paired,
            )


def _score(found: Mapping[str, Any], task: str, name: str) -> _Score:
    """A metric, named `metric,filter`, of a task, or of a group over the documents of all its tasks."""
    values, (metric, _, kept) = found["results"][task], name.partition(",")
    stderr = values.get(f"{metric}_stderr,{kept}")
    leaves, each = [task], dict[tuple[str, int], float]()
    for leaf in leaves:
        leaves += found["group_subtasks"].get(leaf) or ()
        for row in found["samples"].get(leaf, ()):
            if row["filter"] == kept and isinstance(row.get(metric), int | float):
                each[leaf, row["doc_id"]] = float(row[metric])
    is_mean = bool(each) and math.isclose(np.mean([*each.values()]), values[name], abs_tol=1e-9)
    error = float(stderr) if isinstance(stderr, int | float) else None
    return _Score(float(values[name]), error, each if is_mean else {})


def _difference(before: _Score, after: _Score, documents: int) -> tuple[Interval, bool]:
    """With its interval, and whether that is paired by document."""
    estimate, error, each = after.value - before.value, None, after.by_document
    paired = bool(each) and each.keys() == before.by_document.keys()
    if paired and len(each) > 1:
        changes = [value - before.by_document[key] for key, value in each.items()]
        error = float(np.std(changes, ddof=1)) / math.sqrt(len(changes))
    elif not paired and before.stderr is not None and after.stderr is not None:
        error = math.hypot(before.stderr, after.stderr)
    low, high = (None, None) if error is None else (estimate - Z * error, estimate + Z * error)
    return Interval(estimate, low, high, documents), paired
