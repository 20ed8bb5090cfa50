"""The optimizer, and how its learning rate changes with the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from exalign.errors import InputError


def adamw(
    model: nn.Module,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    device: torch.device,
    rate_of: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.AdamW:
    """AdamW over the weights that are trained; only those with two dimensions or more decay.

    `rate_of` a parameter's name is what its learning rate is multiplied with. Trained weights in half precision are an
    `InputError`: a step of relative size 1e-6 would round to nothing.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for _, parameter in trained):
        raise InputError(
            "Weights in half precision cannot take small steps: set the model's dtype to float32 (precision may be "
            "bf16), or train LoRA adapters."
        )
    groups: list[dict[str, Any]] = []
    for rate in sorted({rate_of(name) for name, _ in trained}):
        some = [parameter for name, parameter in trained if rate_of(name) == rate]
        decaying = [parameter for parameter in some if parameter.ndim >= 2]
        others = [parameter for parameter in some if parameter.ndim < 2]
        groups.append({"params": decaying, "weight_decay": weight_decay, "rate": rate})
        groups.append({"params": others, "weight_decay": 0.0, "rate": rate})
    # The rate is set before every step; the fused kernel exists where models are trained.
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, fused=fused)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give every parameter group this rate, times its own."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]


def learning_rate_factor(step: int, *, num_steps: int, warmup_steps: int, schedule: str) -> float:
    """The share of the peak learning rate for optimizer step `step` (from 0) of `num_steps`.

    Warm-up: (step + 1) / (warmup_steps + 1), so that no step has rate 0. After it, with
    u = (step − warmup_steps) / (num_steps − warmup_steps) in [0, 1): `constant` 1, `linear` 1 − u,
    `cosine` (1 + cos πu) / 2.

    >>> [learning_rate_factor(s, num_steps=6, warmup_steps=2, schedule="linear") for s in range(6)]
    [0.3333333333333333, 0.6666666666666666, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    shapes = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1.0 + math.cos(math.pi * progress)) / 2.0}
    return shapes[schedule]
