"""ORPO: `−ℓ̄_w − λ log σ(log odds_w − log odds_l)`, the supervised loss and that of the odds, without a reference.

Hong et al. 2024 (arXiv 2403.07691, Eq. 6 and 7). Mathematics: `objectives.contrastive`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from exalign.methods.contrastive import Contrastive

if TYPE_CHECKING:
    from torch import Tensor

    from exalign.data.batching import GroupValues


class ORPO(Contrastive):
    """Learns the preferred completion by likelihood, and that its odds are the higher ones, without a reference."""

    weight: float = Field(0.1, gt=0, description="λ: weight of the odds' loss beside the supervised one")

    @property
    def line(self) -> str:
        return f"ORPO, λ {self.weight:g}, without a reference"

    def losses(self, logp: Tensor, given: GroupValues) -> Tensor:
        from exalign import objectives

        assert given.preferred is not None
        return objectives.orpo_loss(logp, given.lengths, given.preferred, given.mask, weight=self.weight)
