"""Sampling and scoring by a pool of workers: what the stages do where a recipe has a `cluster`.

The records are those that the stages write without one: the same shards of the same prompts, drawn with the same
numbers. One shard is in memory at a time, here and in each worker.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console

from exalign.data.record import Record
from exalign.data.store import Header, RecordWriter, counted_in, read_header
from exalign.data.store import write_header as close
from exalign.rollout.rollout import Numerics, open_sampler, rollout
from exalign.rollout.scorers import scored
from exalign.rollout.settings import SampleSettings
from exalign.run.cluster import ShardWork, map_shards
from exalign.run.materials import (
    SHARD,
    Scoring,
    iter_prompts,
    purpose_seed,
    run_tokenizer,
    samples_header,
    supervised,
)
from exalign.run.recipe import ClusterSettings
from exalign.run.runner import pin_to_run
from exalign.run.view import View


def sample_by_workers(view: View, settings: SampleSettings, *, folder: Path, purpose: str) -> None:
    """Write samples of π_sft to `folder`, continuing what stands there, and count what was read and drawn."""
    prompts = folder.with_name("prompts")
    _write_prompts(view, prompts)
    map_shards(prompts, folder, partial(_sampling, _for_workers(view), settings, purpose), _cluster(view))
    drawn = counted_in(folder)
    close(folder, samples_header(view, settings, purpose, view.recipe.temperature).with_counts(drawn))
    view.counts.update(drawn)
    shutil.rmtree(prompts)


def score_by_workers(view: View, scorer: Scoring, source: Path, target: Path) -> Counter[str]:
    """Write the records of `source` with the scorer's rewards to `target`, continuing what stands there.

    Returns what the scorer cut.
    """
    map_shards(source, target, partial(_scoring, _for_workers(view), scorer), _cluster(view))
    cut = counted_in(target)
    close(target, read_header(source).with_counts(cut))
    return cut


def _cluster(view: View) -> ClusterSettings:
    assert view.recipe.cluster is not None
    return view.recipe.cluster


def _for_workers(view: View) -> View:
    """The view as it can be sent to another process, which may stand in another folder."""
    return replace(view, run=view.run.resolve(), console=None, counts=Counter())  # type: ignore[arg-type]


def _write_prompts(view: View, folder: Path) -> None:
    """The prompts as shards for the workers, read as a stream; once per stage."""
    if not (folder / "header.json").exists():
        found: Counter[str] = Counter()
        with RecordWriter(folder, shard_size=SHARD) as writer:
            for record in islice(iter_prompts(view, found), writer.written, None):
                writer.write(record)
            writer.close(Header(counts=dict(found)))
    view.counts.update(read_header(folder).counts)


def _sampling(view: View, settings: SampleSettings, purpose: str) -> ShardWork:
    """What a worker holds to sample: the model with its sampler."""
    view = replace(view, console=Console(quiet=True))
    pin_to_run(view.run)
    recipe, tokenizer = view.recipe, run_tokenizer(view)
    numbers = {"temperature": recipe.temperature, "seed": purpose_seed(view, purpose)}
    sampler = open_sampler(supervised(view, tokenizer), tokenizer, settings, **numbers)  # type: ignore[arg-type]

    def work(records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
        counts: Counter[str] = Counter()
        return rollout(records, sampler, counts, Numerics(recipe.temperature)), counts

    return work


def _scoring(view: View, scorer: Scoring) -> ShardWork:
    """What a worker holds to score: the scorer."""
    loaded = scorer.load(replace(view, console=Console(quiet=True)))

    def work(records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
        cut: Counter[str] = Counter()
        return scored(loaded, records, cut), cut

    return work
