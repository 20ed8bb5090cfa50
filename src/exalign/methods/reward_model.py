"""A reward model r(x, y) from preferences: Bradley–Terry on a scalar head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group, completion_mask, stack_preferred
from exalign.errors import InputError
from exalign.models.heads import PackedScorer, completion_outputs
from exalign.objectives import bradley_terry_loss
from exalign.training.batches import Batches, EpochBatches
from exalign.training.loop import model_card, train
from exalign.training.settings import RewardModelSettings


@dataclass(frozen=True, slots=True)
class BradleyTerry:
    """−log σ(r(x, y_w) − r(x, y_l)), averaged over the losers of a prompt; the weight is the prompts."""

    batches: Batches

    def weight(self, groups: Sequence[Group]) -> float:
        return len(groups)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        rewards = completion_outputs(model, groups)[..., 0]
        mask = completion_mask(groups).to(rewards.device)
        preferred = stack_preferred(groups).to(rewards.device)
        accuracy, margin = preference_accuracy(rewards.detach(), preferred, mask)
        loss = bradley_terry_loss(rewards, preferred, mask)
        return loss.sum(), {"accuracy": accuracy.sum(), "margin": margin.sum()}


def train_reward_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    settings: RewardModelSettings,
    folder: Path,
) -> Path:
    """Train a one-label sequence classifier on groups with `preferred`; see `loop.train` for what is written."""
    for group in groups:
        if group.preferred is None or group.num_completions < 2:
            raise InputError(
                f"Row {group.index} has no preference between two completions, which a reward model is trained on."
            )
    batches = EpochBatches(groups, batch_prompts=settings.batch_prompts, epochs=settings.epochs, seed=settings.seed)
    card = model_card(
        "Reward model",
        "A sequence classifier with one label, r(x, y), trained on preferences under the Bradley–Terry model.",
        settings,
        pipeline_tag="text-classification",
    )
    return train(BradleyTerry(batches), PackedScorer(model), tokenizer, settings, folder, card=card)


def preference_accuracy(rewards: Tensor, preferred: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per prompt, over the losers: the share that scores below the preferred one (ties count half), and the margin.

    Shapes: `rewards` `[B, K]`, `preferred` `[B]`, `mask` `[B, K]` → two `[B]`; the margin is mean(r_w − r_l).

    >>> import torch
    >>> preference_accuracy(torch.tensor([[3.0, 1.0, 3.0]]), torch.tensor([0]), torch.ones(1, 3).bool())
    (tensor([0.7500]), tensor([1.]))
    """
    difference = rewards.gather(1, preferred[:, None]) - rewards
    losers = mask.scatter(1, preferred[:, None], False)
    wins = (difference.sign() + 1) / 2
    count = losers.sum(1)
    return (wins * losers).sum(1) / count, (difference * losers).sum(1) / count
