"""GRPO, a baseline: clipped steps on own samples whose advantage is the reward less the prompt's mean, by its spread.

Shao et al. 2024 (arXiv 2402.03300): a ratio per token, a mean over a completion's tokens, and the KL to π_sft as a
penalty per token beside the loss. `ratio: sequence` is GSPO (Zheng et al. 2025, arXiv 2507.18071), a ratio per
completion; without `scale_by_spread` the advantages are those of Liu et al. 2025 (arXiv 2503.20783, "Dr. GRPO").
Mathematics: `objectives.policy_gradient`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from exalign.methods.on_policy import Compute, OwnSamples, drawn_how, plan_of, rows_of
from exalign.methods.rloo import RLOO

if TYPE_CHECKING:
    from torch import Tensor, nn

    from exalign.data.batching import Group, GroupValues


class GRPO(RLOO):
    """Clipped policy gradient on own samples, against the mean of the prompt's completions, a KL penalty per token."""

    family: ClassVar[str] = "grpo"
    beta: float = Field(0.04, ge=0, description="β: what a nat of KL to the supervised policy costs, per token")
    scale_by_spread: bool = Field(True, description="divide advantages by the spread of the prompt's rewards")
    ratio: Literal["token", "sequence"] = Field(
        "token",
        description="token: a probability ratio for each token; sequence: one for a completion, the mean of its "
        "tokens', whose clip is about 3e-4 (GSPO)",
    )

    @property
    def label(self) -> str:
        return "GRPO" if self.ratio == "token" else "GSPO"

    @property
    def optimum_beta(self) -> float | None:
        """None: the gradient of its penalty is that of the other direction of the KL."""
        return None

    @property
    def line(self) -> str:
        spread = "" if self.scale_by_spread else ", not divided by the spread"
        return f"{self.label}, β {self.beta:g}{spread}, {drawn_how(self.fresh_every)}"

    def compute(self, temperature: float) -> Compute:
        from exalign.models.logprobs import completion_token_logprobs

        def by_token(module: nn.Module, reference: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, ...]:
            found = completion_token_logprobs(reference, groups, temperature=temperature)
            if plan_of(self).steps_per_rollout == 1:
                return (found,)
            return found, module(groups, temperature=temperature, by_token=True)

        return by_token

    def losses(
        self, model: nn.Module, groups: Sequence[Group], given: GroupValues, own: OwnSamples
    ) -> tuple[Tensor, Tensor, Tensor]:
        from exalign import objectives

        mask, rewards, (live, rows) = given.mask, given.rewards, given.more
        assert rewards is not None
        logp = model(groups, temperature=own.material.temperature, by_token=True)
        reference, *kept = (rows_of(part, rows, logp) for part in own.tokens)
        sampled = kept[0] if kept else logp.detach()
        lengths = given.lengths.clamp(min=1)
        advantages = objectives.group_mean_advantages(rewards, mask)
        if self.scale_by_spread:
            advantages = objectives.divided_by_spread(advantages, rewards, mask)
        policy, before, start, there = (tensor.flatten(0, 1) for tensor in (logp, sampled, reference, live))

        def mean(of_tokens: Tensor) -> Tensor:
            return of_tokens.sum(dim=1) / lengths.flatten()

        if self.ratio == "sequence":
            loss = objectives.clipped_sequence_loss(policy, before, advantages.flatten(), there, clip=self.clip)
            means = (logp.sum(dim=2) / lengths, sampled.sum(dim=2) / lengths)
            clipped = objectives.is_clipped(*means, advantages, mask, clip=self.clip).to(loss)
        else:
            ratio_of = (policy, before, objectives.token_advantages(advantages.flatten(), there), there)
            loss = mean(objectives.clipped_policy_loss(*ratio_of, clip=self.clip))
            clipped = mean(objectives.is_clipped(*ratio_of, clip=self.clip).to(loss))
        whole = loss + self.beta * mean(objectives.token_kl_penalty(policy, start, there))
        return whole.view(mask.shape), clipped.view(mask.shape), logp.sum(dim=2)
