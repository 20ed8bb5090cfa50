"""One rollout: prompts in, records with K completions, log q, log π_sft and rewards out.

Offline samples, preference pairs from samples, rounds, PPO, searches and evaluation are drawn by it, and every
log π_sft is filled in here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.batching import Group, group_of
from exalign.data.record import Record
from exalign.models.capability import base_of
from exalign.models.logprobs import reference_logprobs
from exalign.models.sizes import reading_budget
from exalign.rollout.sampler import GroupedSampler, Sampler
from exalign.rollout.scorers import Scorer, scored
from exalign.rollout.settings import SampleSettings
from exalign.rollout.vllm import VLLMSampler, engine_of
from exalign.settings import Auto


@dataclass(frozen=True, slots=True)
class Numerics:
    """How log-probabilities are computed: at τ = `temperature`, in which precision, and how many tokens at a time (see
    `reading_budget`).
    """

    temperature: float
    token_budget: int | Auto | None = None
    precision: Literal["fp32", "bf16"] = "fp32"


def open_sampler(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: SampleSettings,
    *,
    temperature: float,
    seed: int,
) -> Sampler:
    """What draws from the policy as it is now: everything that draws opens it here, anew when the weights change."""
    by_vllm = engine_of(settings.engine, base_of(policy).device) == "vllm"
    return (VLLMSampler if by_vllm else GroupedSampler)(policy, tokenizer, settings, temperature=temperature, seed=seed)


def rollout(
    prompts: Sequence[Record],
    sampler: Sampler,
    counts: Counter[str],
    numerics: Numerics,
    *,
    scorer: Scorer | None = None,
    policy: nn.Module | None = None,
    reference: nn.Module | None = None,
) -> list[Record]:
    """The prompts with K completions each, in their order.

    `logprob` is log q(y|x) as the sampler says, or log π(y|x) under `policy`; `reference_logprob` is log π_sft(y|x)
    under `reference`; all in nats at τ. `scorer` gives the rewards. `counts` takes what sampler and scorer count.
    """
    before = Counter(sampler.counts)
    records = list(sampler.sample(prompts))
    counts.update(sampler.counts - before)
    if reference is not None:
        records = with_logprobs(records, reference, "reference_logprob", numerics)
    if policy is not None and policy is reference:  # what π_sft drew is not read twice
        records = [record.with_each("logprob", [c.reference_logprob for c in record.completions]) for record in records]
    elif policy is not None:
        records = with_logprobs(records, policy, "logprob", numerics)
    return records if scorer is None else scored(scorer, records, counts)


def with_logprobs(
    records: Sequence[Record],
    model: nn.Module,
    name: Literal["logprob", "reference_logprob"],
    numerics: Numerics,
) -> list[Record]:
    """Records whose tokens are known, with log π(y|x) of every completion under `model`, in nats, as `name`."""
    groups = [group_of(record, index) for index, record in enumerate(records)]
    rows = logprobs_of(groups, model, numerics)
    return [record.with_each(name, row.tolist()) for record, row in zip(records, rows, strict=True)]


def logprobs_of(groups: Sequence[Group], model: nn.Module, numerics: Numerics) -> list[torch.Tensor]:
    """log π(y|x) of every group's completions under `model`, `[K]` each, by the code path and precision of training."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=numerics.precision == "bf16"):
        budget = reading_budget(model, numerics.token_budget)
        return reference_logprobs(model, groups, temperature=numerics.temperature, token_budget=budget)
