"""Sampling and scoring as stages do it: shard by shard, so that a kill costs one shard and nothing is repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.records import Header, Record, RecordWriter
from exalign.pipeline.run import Run
from exalign.pipeline.sources import device, load_run_tokenizer, load_supervised
from exalign.sampling import GroupedSampler, SampleSettings
from exalign.scoring import Scorer
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
    settings = settings.model_copy(update={"max_prompt_tokens": run.recipe.data.max_prompt_tokens})
    sampler = GroupedSampler(
        model, tokenizer, settings, temperature=run.recipe.temperature, seed=purpose_seed(run, purpose)
    )
    with RecordWriter(folder, shard_size=SHARD) as writer:
        for shard in shards(prompts[writer.written :]):
            for record in sampler.sample(shard):
                writer.write(record)
        writer.close(
            Header(
                model=run.recipe.model.source or run.recipe.name,
                temperature=run.recipe.temperature,
                seed=run.recipe.seed,
                sampler=type(sampler).__name__,
                counts=dict(sampler.counts),
            )
        )
    return sampler.counts


def sample_supervised(
    run: Run, prompts: Sequence[Record], settings: SampleSettings, *, folder: Path, purpose: str
) -> Counter[str]:
    """Samples of π_sft."""
    tokenizer = load_run_tokenizer(run)
    model = load_supervised(run, tokenizer).to(device()).eval()
    return sample_policy(run, model, tokenizer, prompts, settings, folder=folder, purpose=purpose)


def score_records(scorer: Scorer, records: Sequence[Record]) -> list[Record]:
    """The records with the scorer's rewards."""
    return [record.with_rewards(row) for record, row in zip(records, scorer.score(records), strict=True)]


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
