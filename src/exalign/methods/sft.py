"""Supervised fine-tuning: maximum likelihood of the completions, given their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group, microbatches
from exalign.models.logprobs import PackedPolicy, completion_logprobs
from exalign.training.batches import Batches, EpochBatches
from exalign.training.loop import model_card, train
from exalign.training.settings import SFTSettings


@dataclass(frozen=True, slots=True)
class MaximumLikelihood:
    """−Σ log π(y|x) over completions; the weight is their tokens, so the loss is in nats per completion token.

    The temperature is 1: a τ of sampling belongs to the policy that is sampled from, not to the likelihood.
    """

    batches: Batches

    def weight(self, groups: Sequence[Group]) -> float:
        return completion_tokens(groups)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        return -completion_logprobs(model, groups, temperature=1.0).sum(), {}


def train_sft(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    settings: SFTSettings,
    folder: Path,
) -> Path:
    """Train a policy on the completions of `groups`; see `loop.train` for what is written."""
    if settings.train_on_prompts:
        groups = [part for group in groups for part in with_prompt_learnt(group)]
    batches = EpochBatches(groups, batch_prompts=settings.batch_prompts, epochs=settings.epochs, seed=settings.seed)
    card = model_card(
        "Supervised policy",
        "A language model trained by maximum likelihood on completions.",
        settings,
        pipeline_tag="text-generation",
    )
    return train(MaximumLikelihood(batches), PackedPolicy(model), tokenizer, settings, folder, card=card)


def with_prompt_learnt(group: Group) -> Iterator[Group]:
    """The same texts with every token but the prompt's first as a target, each once: the prompt goes before y_1.

    >>> group = Group(0, torch.tensor([1, 2, 3]), (torch.tensor([4]), torch.tensor([5])))
    >>> [(g.prompt_ids.tolist(), [y.tolist() for y in g.completion_ids]) for g in with_prompt_learnt(group)]
    [([1], [[2, 3, 4]]), ([1, 2, 3], [[5]])]
    """
    first, *others = group.completion_ids
    whole = torch.cat([group.prompt_ids[1:], first])
    yield replace(group, prompt_ids=group.prompt_ids[:1], completion_ids=(whole,))
    if others:
        yield replace(group, completion_ids=tuple(others))


def completion_tokens(groups: Sequence[Group]) -> int:
    """Completion tokens of the groups, all K completions counted."""
    return sum(len(ids) for group in groups for ids in group.completion_ids)


@torch.no_grad()
def nats_per_token(model: nn.Module, groups: Sequence[Group], *, token_budget: int = 4096) -> float:
    """−Σ log π(y|x) / Σ |y| over held-out groups, in nats per completion token (τ = 1)."""
    total = 0.0
    for start in range(0, len(groups), 256):  # packing many groups at once takes time quadratic in their number
        for part in microbatches(groups[start : start + 256], token_budget=token_budget):
            total -= float(completion_logprobs(model, part, temperature=1.0).double().sum())
    return total / completion_tokens(groups)
