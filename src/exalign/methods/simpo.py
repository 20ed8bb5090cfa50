"""SimPO: `−log σ(β (ℓ̄_w − ℓ̄_l) − γ)` with ℓ̄ the nats per token, without a reference.

Meng et al. 2024 (arXiv 2405.14734, Eq. 6). Mathematics: `objectives.contrastive`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from exalign.methods.contrastive import Contrastive

if TYPE_CHECKING:
    from torch import Tensor

    from exalign.data.batching import GroupValues


class SimPO(Contrastive):
    """The preferred completion is to be the more likely one by a margin, in nats per token, without a reference."""

    beta: float = Field(2.0, gt=0, description="β: scale of the nats per token (2 to 10 in the paper)")
    gamma: float = Field(1.0, ge=0, description="γ: the margin that is asked for, of the scaled nats")

    @property
    def line(self) -> str:
        return f"SimPO, β {self.beta:g}, γ {self.gamma:g}, without a reference"

    def losses(self, logp: Tensor, given: GroupValues) -> Tensor:
        from exalign import objectives

        assert given.preferred is not None
        how = {"beta": self.beta, "gamma": self.gamma}
        return objectives.simpo_loss(logp, given.lengths, given.preferred, given.mask, **how)
