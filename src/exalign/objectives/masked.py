"""Arithmetic over the completions of each prompt when their number differs from prompt to prompt.

Every tensor here is `[B, K]`: one row per prompt, one column per completion. `mask` is boolean, true where a
completion exists; what stands in the other places, NaN included, reaches neither values nor gradients. A row
without any completion is not a prompt: its log-probabilities are −inf, its sums and means are 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def as_groups(values: Mapping[str, Tensor], mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Check and prepare named `[B, K]` tensors; return them with the mask.

    All come back in one floating type, the widest given and at least float32: half precision would lose whole
    nats on a sequence log-probability. Masked places hold 0 afterwards.

    Raises:
        ValueError: a tensor that is not floating, not `[B, K]` with K ≥ 1, or not shaped like the others;
            a mask that is not boolean or not shaped like the tensors.
    """
    first, *_ = values
    shape = values[first].shape
    dtype = torch.float32
    for name, value in values.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} must hold floating-point numbers, not {value.dtype}")
        if value.ndim != 2 or value.shape[1] == 0:
            raise ValueError(f"{name} must be [B, K] with K ≥ 1, not {list(value.shape)}")
        if value.shape != shape:
            raise ValueError(f"{name} is {list(value.shape)} but {first} is {list(shape)}")
        dtype = torch.promote_types(dtype, value.dtype)
    live = torch.ones(shape, dtype=torch.bool, device=values[first].device) if mask is None else mask
    check_mask(live, shape)
    # A selection, not a product with the mask: 0 · NaN would be NaN, in the value and in the gradient.
    return [torch.where(live, value.to(dtype), 0) for value in values.values()], live


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raise `ValueError` unless `mask` is boolean and has the given shape."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, not {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask is {list(mask.shape)} but the values are {list(shape)}")


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless `value` is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, not {value}")


def check_not_negative(name: str, value: float) -> None:
    """Raise `ValueError` unless `value` is at least 0."""
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, not {value}")


def check_fraction(name: str, value: float) -> None:
    """Raise `ValueError` unless 0 < `value` < 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, not {value}")


def masked_log_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """`log softmax` over the live completions of each row, −inf elsewhere. `[B, K]` → `[B, K]`."""
    alive = mask.any(dim=-1, keepdim=True)
    # A row of nothing but −inf has no softmax (its gradient is NaN): let it be a row of equals, then blank it.
    scores = scores.masked_fill(~mask & alive, -math.inf)
    return torch.log_softmax(scores, dim=-1).masked_fill(~mask, -math.inf)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the live completions, 0 for a row without any. `[B, K]` → `[B]`."""
    count = mask.sum(dim=-1).clamp(min=1)
    return torch.where(mask, values, 0).sum(dim=-1) / count


def weighted_sum(log_weights: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`Σ_i exp(log_weights_i) · values_i` over the live completions. `[B, K]` → `[B]`.

    A weight of zero (log −inf) removes its term, whatever the value: `0 · (−inf) = 0`, as in every entropy.
    """
    counted = mask & ~torch.isneginf(log_weights)
    weights = torch.where(counted, log_weights, 0).exp()
    return torch.where(counted, weights * torch.where(counted, values, 0), 0).sum(dim=-1)
