"""Supervised fine-tuning: maximum likelihood of the completions, given their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from exalign.methods.method import train_on
from exalign.training.train_settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from exalign.data.batching import Group
    from exalign.training.batches import Batches


class SFT(TrainSettings):
    """How the supervised policy π_sft is trained."""

    train_on_prompts: bool = Field(
        False, description="learn the prompts' tokens too, as a model from scratch must; else completions alone"
    )


@dataclass(frozen=True, slots=True)
class MaximumLikelihood:
    """−Σ log π(y|x) over completions; the weight is their tokens, so the loss is in nats per completion token, each
    times the weight of its row.

    The temperature is 1: a τ of sampling belongs to the policy that is sampled from, not to the likelihood.
    """

    batches: Batches

    def weight(self, groups: Sequence[Group]) -> float:
        return sum(group.weight * len(ids) for group in groups for ids in group.completion_ids)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        from exalign.data.batching import stack_weights
        from exalign.models.logprobs import completion_logprobs

        logp = completion_logprobs(model, groups, temperature=1.0)  # 0 where there is no completion
        return -(logp.sum(dim=1) * stack_weights(groups).to(logp)).sum(), {}


def train_sft(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    settings: SFT,
    folder: Path,
) -> Path:
    """Train a policy on the completions of `groups`; see `loop.train` for what is written."""
    from exalign.models.logprobs import PackedPolicy

    if settings.train_on_prompts:
        groups = [part for group in groups for part in with_prompt_learnt(group)]
    text = "A language model trained by maximum likelihood on completions."
    card = ("Supervised policy", text, "text-generation")
    return train_on(groups, MaximumLikelihood, PackedPolicy(model), tokenizer, settings, folder, card=card)


def with_prompt_learnt(group: Group) -> Iterator[Group]:
    """The same texts with every token but the prompt's first as a target, each once: the prompt goes before y_1.

    >>> import torch
    >>> from exalign.data.batching import Group
    >>> group = Group(0, torch.tensor([1, 2, 3]), (torch.tensor([4]), torch.tensor([5])))
    >>> [(g.prompt_ids.tolist(), [y.tolist() for y in g.completion_ids]) for g in with_prompt_learnt(group)]
    [([1], [[2, 3, 4]]), ([1, 2, 3], [[5]])]
    """
    import torch

    first, *others = group.completion_ids
    whole = torch.cat([group.prompt_ids[1:], first])
    yield replace(group, prompt_ids=group.prompt_ids[:1], completion_ids=(whole,))
    if others:
        yield replace(group, completion_ids=tuple(others))
