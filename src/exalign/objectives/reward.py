"""The loss that turns preferences into a reward model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from exalign.objectives.masked import as_groups, masked_mean
from exalign.objectives.matching import preferred_column


def bradley_terry_loss(rewards: Tensor, preferred: Tensor, mask: Tensor | None = None) -> Tensor:
    """Bradley–Terry: `−log σ(r(x, y_w) − r(x, y_l))` (Eq. 3), averaged over the K − 1 completions that lost.

    A prompt whose preferred completion has no rival teaches nothing: its loss and gradient are 0.

    Args:
        rewards: `[B, K]` r(x, y_i), the model's scores.
        preferred: `[B]` int64, the column of the completion that won.
        mask: `[B, K]` bool, true where a completion exists; all do by default.

    Returns:
        `[B]` loss in nats; log 2 where winner and losers score the same.

    Raises:
        ValueError: wrong shape or type, or a preferred completion that does not exist.

    >>> bradley_terry_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.6931])
    """
    (scores,), live = as_groups({"rewards": rewards}, mask)
    if preferred.dtype != torch.int64 or preferred.shape != scores.shape[:1]:
        raise ValueError(
            f"preferred must be int64 [{len(scores)}], one per row of rewards, not {preferred.dtype} "
            f"{list(preferred.shape)}"
        )
    won = preferred_column(preferred, live)
    winner = torch.where(won, scores, 0).sum(dim=-1, keepdim=True)
    return masked_mean(functional.softplus(scores - winner), live & ~won)


def preference_accuracy(rewards: Tensor, preferred: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per prompt, over the losers: the share that scores below the preferred one (ties count half), and the margin.

    Shapes: `rewards` `[B, K]`, `preferred` `[B]`, `mask` `[B, K]` → two `[B]`; the margin is mean(r_w − r_l).

    >>> preference_accuracy(torch.tensor([[3.0, 1.0, 3.0]]), torch.tensor([0]), torch.ones(1, 3).bool())
    (tensor([0.7500]), tensor([1.]))
    """
    difference = rewards.gather(1, preferred[:, None]) - rewards
    losers = mask.scatter(1, preferred[:, None], False)
    wins = (difference.sign() + 1) / 2
    count = losers.sum(1)
    return (wins * losers).sum(1) / count, (difference * losers).sum(1) / count
