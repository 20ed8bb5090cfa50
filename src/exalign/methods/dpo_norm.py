"""DPO with length normalisation: `−log σ(β (h̄_w − h̄_l))` with h̄ the log-ratio to π_sft per token.

Lambert et al. 2024 (arXiv 2411.15124, §5). It is the forward KL of `methods.matching` on nats per token, ε as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from exalign.methods.contrastive import Contrastive

if TYPE_CHECKING:
    from torch import Tensor

    from exalign.data.batching import GroupValues


class DPONorm(Contrastive):
    """DPO on log-ratios per token, so that long completions count no more than short ones."""

    label: ClassVar[str] = "DPO-norm"
    beta: float = Field(5.0, gt=0, description="β: scale of the log-ratios per token (5 in the paper)")
    epsilon: float = Field(0.0, ge=0, lt=0.5, description="ε: mass that the target leaves the others (Eq. 18)")

    @property
    def line(self) -> str:
        return f"DPO per token, β {self.beta:g}, ε {self.epsilon:g}"

    def losses(self, logp: Tensor, given: GroupValues) -> Tensor:
        from exalign import objectives

        assert given.preferred is not None and given.reference_logp is not None
        mask = given.mask
        policy, reference = (objectives.per_token(x, given.lengths, mask) for x in (logp, given.reference_logp))
        log_p_policy = objectives.log_policy_distribution(policy, reference, beta_pi=self.beta, mask=mask)
        log_p_target = objectives.log_preference_target(
            given.preferred, num_completions=mask.shape[1], epsilon=self.epsilon, mask=mask
        )
        return objectives.forward_kl(log_p_policy, log_p_target, mask)
