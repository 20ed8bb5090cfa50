"""CPO: `−ℓ_w − log σ(β (ℓ_w − ℓ_l))`, DPO without a reference beside the supervised loss of the preferred.

Xu et al. 2024 (arXiv 2401.08417, §3). Mathematics: `objectives.contrastive`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from exalign.methods.contrastive import Contrastive

if TYPE_CHECKING:
    from torch import Tensor

    from exalign.data.batching import GroupValues


class CPO(Contrastive):
    """DPO without a reference, beside the likelihood of the preferred completion."""

    beta: float = Field(0.1, gt=0, description="β: scale of the difference of the log-probabilities")

    @property
    def line(self) -> str:
        return f"CPO, β {self.beta:g}, without a reference"

    def losses(self, logp: Tensor, given: GroupValues) -> Tensor:
        from exalign import objectives

        assert given.preferred is not None
        return objectives.cpo_loss(logp, given.preferred, given.mask, beta=self.beta)
