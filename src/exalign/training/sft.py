"""Supervised fine-tuning: maximum likelihood of the completions, given their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group, microbatches
from exalign.models.logprobs import PackedPolicy, completion_logprobs
from exalign.training.batches import Batches, EpochBatches
from exalign.training.card import model_card
from exalign.training.loop import TrainSettings, train


class SFTSettings(TrainSettings):
    """How the supervised policy π_sft is trained."""


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
    batches = EpochBatches(groups, batch_prompts=settings.batch_prompts, epochs=settings.epochs, seed=settings.seed)
    card = model_card(
        "Supervised policy",
        "A language model trained by maximum likelihood on completions.",
        settings,
        pipeline_tag="text-generation",
    )
    return train(MaximumLikelihood(batches), PackedPolicy(model), tokenizer, settings, folder, card=card)


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
