"""What methods share that contrast the completions of a preference by a loss of their own, without a target.

Each is a file of its own beside this one, and a pure function of `objectives.contrastive`. Log-probabilities are at the
recipe's τ, sums over tokens in nats. log π_sft is there for all of them, computed once: those whose loss has no
reference log by it how far they have gone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from exalign.methods.matching import check_groups, log_ratio_metrics
from exalign.methods.method import Material, Method, TrainsOn, train_on

if TYPE_CHECKING:
    from torch import Tensor, nn

    from exalign.data.batching import Group, GroupValues
    from exalign.models.logprobs import PackedPolicy
    from exalign.training.batches import Batches, EpochBatches


class Contrastive(Method):
    """A loss of the log-probabilities of a prompt's K completions, one of which is preferred."""

    @property
    def trains_on(self) -> TrainsOn:
        return "preferences"

    @property
    def fewest(self) -> int:
        """Completions that a row must have."""
        return 2

    @abstractmethod
    def losses(self, logp: Tensor, given: GroupValues) -> Tensor:
        """Of every prompt `[B]`, with gradient, from log π_θ(y_i|x) `[B, K]` and what its rows say."""

    def task_of(self, module: PackedPolicy, material: Material) -> Callable[[EpochBatches], ContrastiveTask]:
        return partial(ContrastiveTask, settings=self, temperature=material.temperature)

    def train(self, material: Material, folder: Path) -> Path:
        from exalign.models.logprobs import PackedPolicy

        check_groups([*material.groups, *material.held_out], self, fewest=self.fewest)
        module = PackedPolicy(material.policy)
        text = f"A language model aligned by {self.line}, at τ = {material.temperature}."
        how = (self.task_of(module, material), module, material.tokenizer, self, folder)
        card = ("Aligned policy", text, "text-generation")
        return train_on(material.groups, *how, card=card, held_out=material.held_out)


@dataclass(frozen=True)
class ContrastiveTask:
    """The losses of the settings; the weight is the prompts, each times that of its row."""

    batches: Batches
    settings: Contrastive
    temperature: float

    def weight(self, groups: Sequence[Group]) -> float:
        return sum(group.weight for group in groups)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        from exalign.data.batching import values_of
        from exalign.models.logprobs import completion_logprobs

        logp = completion_logprobs(model, groups, temperature=self.temperature)
        given = values_of(groups, logp.device)
        losses = self.losses(logp, given)
        weights = given.weights.to(losses.dtype)
        metrics = self.metrics(logp.detach(), given)
        return (losses * weights).sum(), {name: (value * weights).sum() for name, value in metrics.items()}

    def losses(self, logp: Tensor, given: GroupValues) -> Tensor:
        return self.settings.losses(logp, given)

    def metrics(self, logp: Tensor, given: GroupValues) -> dict[str, Tensor]:
        """Per prompt `[B]`."""
        return log_ratio_metrics(given, logp, pairs=True)
