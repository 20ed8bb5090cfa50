"""Sampling and scoring by a pool of workers: what the stages do where a recipe has a `cluster`.

The records are those that the stages write without one: the same shards of the same prompts, drawn with the same
numbers. One shard is in memory at a time, here and in each worker.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console

from exalign.data.record import Record
from exalign.data.store import Header, RecordWriter, counted_in, iter_shard, read_header, shards_of
from exalign.data.store import write_header as close
from exalign.rollout.sampler import GroupedSampler
from exalign.rollout.scorers import scored
from exalign.rollout.settings import SampleSettings, ScorerSettings, VLLMSettings
from exalign.rollout.vllm import VLLMSampler, engine_arguments
from exalign.run.cluster import ShardWork, map_shards
from exalign.run.cluster_settings import ClusterSettings
from exalign.run.on_demand import (
    SHARD,
    purpose_seed,
    sample_settings,
    sampled_logprobs,
    samples_header,
)
from exalign.run.recipe import Recipe
from exalign.run.runner import Run
from exalign.run.sources import (
    iter_prompts,
    load_run_tokenizer,
    load_scorer,
    load_supervised,
    ready,
    supervised_settings,
)
from exalign.terminal import shown

CHECKED = 8
"""Records whose log-probabilities under vLLM are compared with the training path's."""


def sample_by_workers(
    run: Run, cluster: ClusterSettings, settings: SampleSettings, *, folder: Path, purpose: str, counts: Counter[str]
) -> None:
    """Write samples of π_sft to `folder`, continuing what stands there, and count what was read and drawn."""
    prompts = folder.with_name("prompts")
    _write_prompts(run, prompts, counts)
    given = (run.recipe, run.folder.resolve(), settings, purpose)
    map_shards(prompts, folder, partial(_sampling, *given), cluster)
    drawn = counted_in(folder)
    if cluster.vllm is not None:
        _check_logprobs(run, folder, settings, cluster.vllm, drawn)
    sampler = GroupedSampler if cluster.vllm is None else VLLMSampler
    close(folder, samples_header(run, settings, sampler, purpose, drawn))
    counts.update(drawn)
    shutil.rmtree(prompts)


def score_by_workers(
    run: Run, cluster: ClusterSettings, settings: ScorerSettings, source: Path, target: Path
) -> Counter[str]:
    """Write the records of `source` with the scorer's rewards to `target`, continuing what stands there.

    Returns what the scorer cut.
    """
    map_shards(source, target, partial(_scoring, run.recipe, run.folder.resolve(), settings), cluster)
    cut = counted_in(target)
    close(target, read_header(source).with_counts(cut))
    return cut


def _write_prompts(run: Run, folder: Path, counts: Counter[str]) -> None:
    """The prompts as shards for the workers, read as a stream; once per stage."""
    if not (folder / "header.json").exists():
        found: Counter[str] = Counter()
        with RecordWriter(folder, shard_size=SHARD) as writer:
            for record in islice(iter_prompts(run, found), writer.written, None):
                writer.write(record)
            writer.close(Header(counts=dict(found)))
    counts.update(read_header(folder).counts)


def _sampling(recipe: Recipe, folder: Path, settings: SampleSettings, purpose: str) -> ShardWork:
    """What a worker holds to sample: the model with its sampler."""
    run = Run(recipe, folder, Console(quiet=True))
    tokenizer, whole = load_run_tokenizer(run), sample_settings(run, settings)
    numbers = {"temperature": recipe.temperature, "seed": purpose_seed(run, purpose)}
    sampler: GroupedSampler | VLLMSampler
    if recipe.cluster is not None and recipe.cluster.vllm is not None:
        gpus = recipe.cluster.gpus_per_worker or 1
        engine = engine_arguments(recipe.cluster.vllm, whole, dtype=recipe.model.dtype, gpus=gpus)
        source = Path(str(supervised_settings(run).source))
        sampler = VLLMSampler(source, tokenizer, whole, engine=engine, **numbers)  # type: ignore[arg-type]
    else:
        model = ready(load_supervised(run, tokenizer))
        sampler = GroupedSampler(model, tokenizer, whole, **numbers)  # type: ignore[arg-type]

    def work(records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
        before = Counter(sampler.counts)
        return list(sampler.sample(records)), sampler.counts - before

    return work


def _scoring(recipe: Recipe, folder: Path, settings: ScorerSettings) -> ShardWork:
    """What a worker holds to score: the scorer."""
    scorer = load_scorer(settings, Run(recipe, folder, Console(quiet=True)))

    def work(records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
        cut: Counter[str] = Counter()
        return scored(scorer, records, cut), cut

    return work


def _check_logprobs(run: Run, folder: Path, settings: SampleSettings, vllm: VLLMSettings, counts: Counter[str]) -> None:
    """Compare some log-probabilities of the engine with those of the training path, and say where they differ."""
    records = list(islice(iter_shard(shards_of(folder)[0]), CHECKED))
    tokenizer = load_run_tokenizer(run)
    values = sampled_logprobs(run, ready(load_supervised(run, tokenizer)), tokenizer, records)
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
        run.console.print(shown(text, "bold red"), soft_wrap=True)


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
