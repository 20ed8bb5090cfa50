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
from exalign.data.store import Header, RecordWriter, counted_in, iter_shard, read_header, shards_of
from exalign.data.store import write_header as close
from exalign.models.model_settings import ModelSettings
from exalign.rollout.rollout import Numerics, open_sampler, rollout, with_logprobs
from exalign.rollout.sampler import Sampler
from exalign.rollout.scorers import scored
from exalign.rollout.settings import SampleSettings, VLLMSettings
from exalign.rollout.vllm import VLLMSampler, engine_arguments
from exalign.run.cluster import ShardWork, map_shards
from exalign.run.materials import (
    SHARD,
    Scoring,
    iter_prompts,
    purpose_seed,
    run_tokenizer,
    samples_header,
    supervised,
    supervised_settings,
)
from exalign.run.recipe import ClusterSettings
from exalign.run.runner import pin_to_run
from exalign.run.view import View
from exalign.terminal import shown

CHECKED = 8
"""Records whose log-probabilities under vLLM are compared with the training path's."""


def sample_by_workers(view: View, settings: SampleSettings, *, folder: Path, purpose: str) -> None:
    """Write samples of π_sft to `folder`, continuing what stands there, and count what was read and drawn."""
    cluster, prompts = _cluster(view), folder.with_name("prompts")
    _write_prompts(view, prompts)
    map_shards(prompts, folder, partial(_sampling, _for_workers(view), settings, purpose), cluster)
    drawn = counted_in(folder)
    if cluster.vllm is not None:
        _check_logprobs(view, folder, settings, cluster.vllm, drawn)
    close(folder, samples_header(view, settings, purpose).with_counts(drawn))
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
    recipe, tokenizer, cluster = view.recipe, run_tokenizer(view), _cluster(view)
    numbers = {"temperature": recipe.temperature, "seed": purpose_seed(view, purpose)}
    sampler: Sampler
    if cluster.vllm is not None:
        started: ModelSettings = supervised_settings(view)
        engine = engine_arguments(cluster.vllm, settings, dtype=started.dtype, gpus=cluster.gpus_per_worker or 1)
        sampler = VLLMSampler(Path(str(started.source)), tokenizer, settings, engine=engine, **numbers)  # type: ignore[arg-type]
    else:
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


def _check_logprobs(
    view: View, folder: Path, settings: SampleSettings, vllm: VLLMSettings, counts: Counter[str]
) -> None:
    """Compare some log-probabilities of the engine with those of the training path, and say where they differ."""
    records = list(islice(iter_shard(shards_of(folder)[0]), CHECKED))
    model = supervised(view, run_tokenizer(view))
    known = with_logprobs(records, model, "reference_logprob", Numerics(view.recipe.temperature))
    values = [[float(c.reference_logprob or 0.0) for c in record.completions] for record in known]
    truncated = settings.top_p is not None or settings.top_k is not None
    gaps = logprob_gaps(records, values, truncated=truncated)
    counts["logprobs_checked"] = len(gaps)
    counts["logprobs_that_differ"] = sum(gap > vllm.logprob_limit for gap in gaps)
    if counts["logprobs_that_differ"]:
        text = (
            f"  {counts['logprobs_that_differ']} of {len(gaps)} log-probabilities of vLLM differ from the training "
            f"path's by more than {vllm.logprob_limit} nats per token (at most {max(gaps):.3f}): what was sampled is "
            "not what the recipe's model gives; compare dtype and temperature before you align on these samples."
        )
        view.console.print(shown(text, "bold red"), soft_wrap=True)


def logprob_gaps(records: Sequence[Record], values: Sequence[Sequence[float]], *, truncated: bool) -> list[float]:
    """|log q(y|x) − log π(y|x)| / T of every completion, in nats per token; `values` are the log π.

    Where the draw was `truncated` to the most probable tokens, log q may be above log π by any amount, and only what it
    is below counts.

    >>> from exalign.data.record import Completion
    >>> record = Record("a", "Hi", (Completion("b c", (1, 2), "length", -3.0),))
    >>> logprob_gaps([record], [[-3.5]], truncated=False), logprob_gaps([record], [[-3.5]], truncated=True)
    ([0.25], [0.0])
    """
    gaps = []
    for record, row in zip(records, values, strict=True):
        for completion, value in zip(record.completions, row, strict=True):
            assert completion.logprob is not None and completion.token_ids
            gap = (completion.logprob - value) / len(completion.token_ids)
            gaps.append(max(-gap, 0.0) if truncated else abs(gap))
    return gaps
