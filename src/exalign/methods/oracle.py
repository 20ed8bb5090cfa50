"""A binary classifier of texts, whose log-odds serve as the oracle reward of the controlled-sentiment experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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


class Oracle(TrainSettings):
    """How the classifier is trained."""

    model: ModelSettings = Field(description="the classifier to start from; with a config it is trained from scratch")
    max_tokens: int = Field(512, gt=1, description="longer texts are cut on the right")


@dataclass(frozen=True, slots=True)
class BinaryCrossEntropy:
    """−log p(label | text) in nats, `labels[group.index]` 0 or 1; one completion per group; the weight is the texts,
    each times that of its row."""

    batches: Batches
    labels: Sequence[int]

    def weight(self, groups: Sequence[Group]) -> float:
        return sum(group.weight for group in groups)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        import torch
        from torch.nn.functional import cross_entropy

        from exalign.data.batching import stack_weights
        from exalign.device import to_device
        from exalign.models.heads import completion_outputs

        logits = completion_outputs(model, groups)[:, 0]
        labels = torch.tensor([self.labels[group.index] for group in groups])
        labels, weights = to_device(logits.device, labels, stack_weights(groups))
        weights = weights.to(logits.dtype)
        correct = weights * (logits.argmax(dim=1) == labels)
        return (weights * cross_entropy(logits, labels, reduction="none")).sum(), {"accuracy": correct.sum()}


def train_classifier(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    labels: Sequence[int],
    settings: Oracle,
    folder: Path,
) -> Path:
    """Train a two-label sequence classifier; see `loop.train` for what is written."""
    from exalign.models.heads import PackedScorer

    for group in groups:
        if group.num_completions != 1 or not 0 <= group.index < len(labels) or labels[group.index] not in (0, 1):
            raise InputError(f"Row {group.index} is not one text with a label 0 or 1, as a classifier needs.")
    card = ("Classifier", "A sequence classifier with two labels; its log-odds are a reward.", "text-classification")
    task = partial(BinaryCrossEntropy, labels=labels)
    return train_on(groups, task, PackedScorer(model), tokenizer, settings, folder, card=card)
