"""A reward model r(x, y) from preferences: Bradley–Terry on a scalar head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from exalign.errors import InputError
from exalign.methods.method import train_on
from exalign.models.model_settings import ModelSettings
from exalign.training.train_settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from exalign.data.batching import Group
    from exalign.training.batches import Batches


class RewardModel(TrainSettings):
    """How the reward model is trained."""

    model: ModelSettings | None = Field(None, description="the model to start from; null: the supervised policy")


@dataclass(frozen=True, slots=True)
class BradleyTerry:
    """−log σ(r(x, y_w) − r(x, y_l)), averaged over the losers of a prompt; the weight is the prompts, each times that
    of its row."""

    batches: Batches

    def weight(self, groups: Sequence[Group]) -> float:
        return sum(group.weight for group in groups)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        from exalign.data.batching import values_of
        from exalign.models.heads import completion_outputs
        from exalign.objectives import bradley_terry_loss, preference_accuracy

        rewards = completion_outputs(model, groups)[..., 0]
        given = values_of(groups, rewards.device)
        assert given.preferred is not None
        accuracy, margin = preference_accuracy(rewards.detach(), given.preferred, given.mask)
        loss, weights = bradley_terry_loss(rewards, given.preferred, given.mask), given.weights.to(rewards.dtype)
        return (loss * weights).sum(), {"accuracy": (accuracy * weights).sum(), "margin": (margin * weights).sum()}


def train_reward_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    settings: RewardModel,
    folder: Path,
) -> Path:
    """Train a one-label sequence classifier on groups with `preferred`; see `loop.train` for what is written."""
    from exalign.models.heads import PackedScorer

    for group in groups:
        if group.preferred is None or group.num_completions < 2:
            raise InputError(
                f"Row {group.index} has no preference between two completions, which a reward model is trained on."
            )
    text = "A sequence classifier with one label, r(x, y), trained on preferences under the Bradley–Terry model."
    card = ("Reward model", text, "text-classification")
    return train_on(groups, BradleyTerry, PackedScorer(model), tokenizer, settings, folder, card=card)
