"""AdamW over the weights that are trained, those of 16 bits included, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from exalign.errors import InputError
from exalign.models.loading import untrainable


def adamw(
    model: nn.Module,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    device: torch.device,
    rate_of: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.AdamW:
    """AdamW over the weights that are trained; only those with two dimensions or more decay.

    `rate_of` a parameter's name is what its learning rate is multiplied with. Weights in bfloat16 take the steps of
    float32 ones (see `whole_weights`). Weights of a type that cannot be trained here are an `InputError`.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for reason in filter(None, map(untrainable, {parameter.dtype for _, parameter in trained})):
        raise InputError(f"These weights cannot be trained: {reason}; load the model in float32, or train adapters.")
    if not trained:
        raise InputError("No weight of this model is trained: all of them are frozen.")
    groups: list[dict[str, Any]] = []
    for rate in sorted({rate_of(name) for name, _ in trained}):
        for wide, decay in ((True, weight_decay), (False, 0.0)):
            some = [weight for name, weight in trained if rate_of(name) == rate and (weight.ndim >= 2) == wide]
            if some:
                groups.append({"params": some, "weight_decay": decay, "rate": rate})
    # The rate is set before every step; the fused kernel exists where models are trained.
    fused = device.type in ("cpu", "cuda")
    kind = _AdamWOfHalves if any(parameter.dtype == torch.bfloat16 for _, parameter in trained) else torch.optim.AdamW
    return kind(groups, lr=0.0, betas=betas, fused=fused)


class _AdamWOfHalves(torch.optim.AdamW):
    """AdamW over bfloat16 weights that takes the steps of float32 ones, bit for bit.

    A bfloat16 number is the upper half of a float32 number's bits. So a weight of the model is the float32 weight
    rounded to the nearest (ties away from zero), and here is kept, in 16 bits, by how much their bit patterns differ.
    A step moves the whole weights, gradients are summed in float32, the moments are float32: 14 bytes for each weight
    beside its own two, where a float32 weight has 12 beside its four.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        trained = [weight for group in self.param_groups for weight in group["params"]]
        self._rest: dict[Tensor, Tensor | int] = {weight: 0 for weight in trained if weight.dtype == torch.bfloat16}
        for weight in self._rest:
            weight.grad_dtype = torch.float32

    @contextmanager
    def whole(self) -> Iterator[None]:
        narrow = [weight for weight in self._rest if weight.dtype == torch.bfloat16]
        for weight in narrow:
            bits = weight.data.view(torch.int16).to(torch.int32)
            weight.data = ((bits << 16) + self._rest[weight]).view(torch.float32)
        try:
            yield
        finally:
            for weight in narrow:
                bits = weight.data.view(torch.int32)
                upper = (bits + 2**15) >> 16
                self._rest[weight] = (bits - (upper << 16)).to(torch.int16)
                weight.data = upper.to(torch.int16).view(torch.bfloat16)

    def step(self, closure: Any = None) -> Any:
        with self.whole():
            return super().step(closure)


def whole_weights(optimizer: Optimizer) -> AbstractContextManager[None]:
    """Within it weights of 16 bits are the float32 weights that the optimizer knows: to be saved, or to be put."""
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    return inner.whole() if isinstance(inner, _AdamWOfHalves) else nullcontext()


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
