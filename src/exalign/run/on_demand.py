"""Sampling and scoring as stages do it: shard by shard, so that a kill costs one shard and nothing is repeated."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.batching import group_of
from exalign.data.record import Record
from exalign.data.store import Header, RecordWriter
from exalign.data.tokenization import tokenize_records
from exalign.models.flops import forward_flops, matmul_peak
from exalign.models.logprobs import reference_logprobs
from exalign.redaction import redact
from exalign.rollout.sampler import GroupedSampler, Sampler
from exalign.rollout.settings import SampleSettings
from exalign.run.runner import Run
from exalign.run.sources import SCORING_TOKENS, load_run_tokenizer, load_supervised, model_identity, ready
from exalign.run.speed import record_speed, say_speed
from exalign.storage import fingerprint

SHARD = 256
"""Prompts that are sampled and written together."""

Item = TypeVar("Item")


def shards(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """The items, `SHARD` at a time."""
    for start in range(0, len(items), SHARD):
        yield items[start : start + SHARD]


def purpose_seed(run: Run, purpose: str) -> int:
    """A seed for one use of the sampler, so that the same prompt gets other samples for another purpose."""
    return int(fingerprint([run.recipe.seed, purpose]), 16) >> 1


def sample_settings(run: Run, settings: SampleSettings) -> SampleSettings:
    """The settings with the recipe's one limit of prompts."""
    return settings.model_copy(update={"max_prompt_tokens": run.recipe.data.max_prompt_tokens})


def samples_header(
    run: Run, settings: SampleSettings, sampler: type[Sampler], purpose: str, counts: Counter[str]
) -> Header:
    """Where samples of the run's policy came from."""
    whole = sample_settings(run, settings)
    return Header(
        model=redact(run.recipe.model.source or run.recipe.name),
        tokenizer=redact(run.recipe.tokenizer.source or run.recipe.model.source or "trained by this run"),
        temperature=run.recipe.temperature,
        seed=run.recipe.seed,
        sampler=sampler.__name__,
        fingerprint=fingerprint([model_identity(run.recipe), whole.model_dump(), purpose, run.recipe.seed]),
        counts=dict(counts),
    )


def sample_policy(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Record],
    settings: SampleSettings,
    *,
    folder: Path,
    purpose: str,
) -> Counter[str]:
    """Write samples of the policy at τ to `folder`, continuing what stands there; return what was counted.

    `purpose` seeds the samples, and names them in the header.
    """
    sampler = GroupedSampler(
        model,
        tokenizer,
        sample_settings(run, settings),
        temperature=run.recipe.temperature,
        seed=purpose_seed(run, purpose),
    )
    tokens, seconds, work, peak = 0, 0.0, 0.0, 0.0
    with RecordWriter(folder) as writer:
        for shard in shards(prompts[writer.written :]):
            before, started = Counter(sampler.counts), time.perf_counter()
            records = list(sampler.sample(shard))
            seconds += time.perf_counter() - started
            groups = [group_of(record, 0) for record in records]
            tokens += sum(len(ids) for group in groups for ids in group.completion_ids)
            work += forward_flops(model, groups)
            peak = peak or matmul_peak(model)
            record_speed(folder.parent, tokens, seconds, work, peak)  # before the shard: a kill cannot come between
            writer.write_shard(records, sampler.counts - before)
        writer.close(samples_header(run, settings, type(sampler), purpose, writer.counts))
    return writer.counts


def sample_supervised(
    run: Run, prompts: Sequence[Record], settings: SampleSettings, *, folder: Path, purpose: str
) -> Counter[str]:
    """Samples of π_sft."""
    tokenizer = load_run_tokenizer(run)
    model = ready(load_supervised(run, tokenizer))
    counts = sample_policy(run, model, tokenizer, prompts, settings, folder=folder, purpose=purpose)
    say_speed(run, folder.parent)
    return counts


def sampled_logprobs(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> list[list[float]]:
    """log π(y_i|x) at τ of every sample of the records under `model`, by the code path of training; nothing is cut."""
    longest = run.recipe.data.max_prompt_tokens + run.recipe.sample.max_new_tokens
    groups = list(
        tokenize_records(records, tokenizer, max_prompt_tokens=longest, max_completion_tokens=longest, counts=Counter())
    )
    logps = reference_logprobs(model, groups, temperature=run.recipe.temperature, token_budget=SCORING_TOKENS)
    return [values.tolist() for values in logps]


def with_reference_logprobs(records: Sequence[Record], values: Sequence[Sequence[float]]) -> list[Record]:
    """The records with log π_sft of every completion, in nats."""
    return [
        replace(
            record,
            completions=tuple(
                replace(completion, reference_logprob=float(value))
                for completion, value in zip(record.completions, row, strict=True)
            ),
        )
        for record, row in zip(records, values, strict=True)
    ]
