"""RLOO, a baseline: the policy gradient on own samples, each completion's baseline the mean of the prompt's others.

The reward of a completion is `r − β log(π_q/π_sft)`, of the policy π_q that drew it. On-policy, EXO at β_π = 1 and
β_r = β has the same gradient divided by β, times (K−1)/K. Mathematics: `objectives.policy_gradient`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from exalign.methods.method import Amount, Material, Method, TrainsOn
from exalign.methods.on_policy import (
    Compute,
    OwnSamples,
    drawn_how,
    fresh_problems,
    own_amount,
    token_places,
    train_on_own_samples,
    whole_only,
)
from exalign.rollout.settings import SampleSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from exalign.data.batching import Group, GroupValues
    from exalign.training.batches import Batches


class RLOO(Method):
    """Policy gradient on own samples, against the mean of the prompt's other completions, with the KL in the reward."""

    trains_on: ClassVar[TrainsOn] = "prompts"
    family: ClassVar[str] = "rloo"
    fresh_every: int = Field(1, gt=0, description="optimizer steps that own samples serve; 1 is on-policy")
    passes: int = Field(1, gt=0, description="times each rollout is trained on")
    beta: float = Field(0.1, ge=0, description="β: what a nat of KL to the supervised policy costs")
    clip: float = Field(0.2, gt=0, description="how far a probability ratio may go from 1 in one rollout")

    @property
    def optimum_beta(self) -> float | None:
        return self.beta or None

    @property
    def line(self) -> str:
        return f"{self.label}, β {self.beta:g}, {drawn_how(self.fresh_every)}"

    @property
    def amount(self) -> Amount:
        return own_amount(self)

    def problems(self) -> Iterator[str]:
        yield from fresh_problems(self)
        for name in ("clip", "ratio") if self.fresh_every == 1 else ():
            if name in type(self).model_fields and self.changed(name):
                yield f"{name} has no effect with fresh_every = 1, where all ratios are 1; remove it"

    def sampling_problems(self, sampling: SampleSettings) -> Iterator[str]:
        yield from whole_only(sampling)
        if sampling.num_completions < 2:
            yield "compares the completions of a prompt; sample.num_completions must be at least 2"

    def compute(self, temperature: float) -> Compute | None:
        """What it keeps of every token of its samples, if anything."""
        return None

    def losses(
        self, model: nn.Module, groups: Sequence[Group], given: GroupValues, own: OwnSamples
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of every completion `[B, K]`: its loss with gradient, whether its ratio is clipped, and log π_θ(y|x).

        `−min(ρ A, clamp(ρ) A)` with ρ = π_θ/π_q of the whole completion.
        """
        from exalign import objectives
        from exalign.models.logprobs import completion_logprobs

        logp = completion_logprobs(model, groups, temperature=own.material.temperature)
        rewards, reference, sampled = given.rewards, given.reference_logp, own.drawn_by(logp, given).proposal_logp
        assert rewards is not None and reference is not None and sampled is not None
        penalised = objectives.penalised_rewards(rewards, sampled, reference, given.mask, beta=self.beta)
        ratio_of = (logp, sampled, objectives.leave_one_out_advantages(penalised, given.mask), given.mask)
        loss = objectives.clipped_policy_loss(*ratio_of, clip=self.clip)
        return loss, objectives.is_clipped(*ratio_of, clip=self.clip).to(loss), logp

    def train(self, material: Material, folder: Path) -> Path:
        from exalign.models.logprobs import PackedPolicy

        compute = self.compute(material.temperature)
        own = OwnSamples(PackedPolicy(material.policy), material, self, folder, compute=compute)
        how = f"{drawn_how(self.fresh_every)}, at τ = {material.temperature}"
        title, text = f"Policy trained by {self.label}", f"A language model trained by {self.label}, {how}."
        return train_on_own_samples(PolicyGradientTask(self, own), own, folder, title=title, text=text)


@dataclass(frozen=True, slots=True)
class PolicyGradientTask:
    """The mean of the completions' losses per prompt; the weight is the prompts, each times that of its row."""

    settings: RLOO
    own: OwnSamples

    @property
    def batches(self) -> Batches:
        return self.own.batches

    @property
    def numbers(self) -> dict[str, float]:
        """What a step's row says of the rollout that it belongs to."""
        return self.own.numbers

    def weight(self, groups: Sequence[Group]) -> float:
        return sum(group.weight for group in groups)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        from exalign.data.batching import values_of
        from exalign.models.capability import device_of

        given = values_of(groups, device_of(model), *token_places(groups))
        losses, clipped, logp = self.settings.losses(model, groups, given, self.own)
        weights, completions = given.weights.to(losses.dtype), given.mask.sum(dim=1)
        seen = self.own.correction(logp, given) | {"clip_fraction": clipped.sum(dim=1) / completions}
        loss = losses.sum(dim=1) / completions
        return (loss * weights).sum(), {name: (value * weights).sum() for name, value in seen.items()}
