"""IPO: `(h_w − h_l − 1/(2β))²` with h the log-ratio to π_sft.

Azar et al. 2023 (arXiv 2310.12036, Eq. 17; β is its τ). h is summed over tokens, as in the paper; TRL's IPO takes the
mean. Mathematics: `objectives.contrastive`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from exalign.methods.contrastive import Contrastive

if TYPE_CHECKING:
    from torch import Tensor

    from exalign.data.batching import GroupValues


class IPO(Contrastive):
    """The margin of the log-ratios is to be 1/(2β), no less and no more."""

    beta: float = Field(0.1, gt=0, description="β: the margin is to be 1/(2β) nats (τ in the paper)")

    @property
    def line(self) -> str:
        return f"IPO, β {self.beta:g}: a margin of {1 / (2 * self.beta):g} nats"

    def losses(self, logp: Tensor, given: GroupValues) -> Tensor:
        from exalign import objectives

        assert given.preferred is not None and given.reference_logp is not None
        return objectives.ipo_loss(logp, given.reference_logp, given.preferred, given.mask, beta=self.beta)
