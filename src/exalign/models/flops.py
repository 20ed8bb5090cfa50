"""How much arithmetic a model must do for a list of groups, and how fast this machine multiplies its matrices.

The necessary work is: every distinct prompt and completion token once (the last token of a completion is only ever a
target), the head only where a completion token is predicted (the K first tokens of a group share one position), causal
attention only. A multiplication and an addition are two operations. Norms, activations, softmax and the optimizer are
not counted, so a share of the peak below 1 is what remains after them as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from exalign.data.batching import Group
from exalign.device import wait
from exalign.models.capability import base_of, body_of, widest

_PEAK_ROWS, _ACCELERATOR_ROWS = (256, 1024), (4096, 16384)  # fewer do not fill an accelerator
_PEAK_SIDE = 4096  # of a larger weight a part is multiplied: the rate is the same, and a vocabulary takes long


@dataclass(frozen=True, slots=True)
class Positions:
    """What the groups ask for: `tokens` through the body, `rows` through the head, `pairs` of query and key."""

    tokens: int
    rows: int
    pairs: int


def necessary_positions(groups: Sequence[Group]) -> Positions:
    """Count them. With a prompt of P tokens and completions of T_i, of which the last token is never read:

    tokens = P + Σ (T_i − 1), rows = 1 + Σ (T_i − 1), pairs = P (P + 1) / 2 + Σ (T_i − 1) (P + T_i / 2).

    >>> ids = torch.arange(9)
    >>> necessary_positions([Group(0, ids[:4], (ids[:3], ids[:1]))])
    Positions(tokens=6, rows=3, pairs=21)
    """
    tokens = rows = pairs = 0
    for group in groups:
        prompt, read = len(group.prompt_ids), [len(ids) - 1 for ids in group.completion_ids]
        tokens += prompt + sum(read)
        rows += 1 + sum(read)
        pairs += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in read)
    return Positions(tokens, rows, pairs)


def forward_flops(model: nn.Module, groups: Sequence[Group]) -> float:
    """Operations of one forward pass: also what drawing these completions costs, each token read once.

    Of the body, every linear layer is counted for every token, so experts that a token does not visit are counted too,
    and a sliding window is not subtracted.
    """
    return sum(count for _, count in _products(model, groups)) + _attention(model, groups)


def training_flops(model: nn.Module, groups: Sequence[Group]) -> float:
    """Operations of a forward and a backward pass: three times the forward's, two for weights that are not trained."""
    products = sum(count * (3 if trained else 2) for trained, count in _products(model, groups))
    return products + 3 * _attention(model, groups)


@torch.no_grad()
def matmul_peak(model: nn.Module, *, dtype: torch.dtype | None = None, repeats: int = 3) -> float:
    """The best rate, in operations per second, measured now over the matrix products of this model.

    Each shape of weight is multiplied with some rows (on a CPU 256 and 1,024), as the forward does and as the gradient
    of the input does; `dtype` is the type of the products (default: that of the weights). On a machine that is busy
    with other work the result is the rate that was left.
    """
    weights = {weight.shape: weight for part in _body_and_head(model) for _, weight in part}
    best = 0.0
    for shape, weight in weights.items():
        # Not the weight itself, of which a process may hold a part.
        sides = [min(side, _PEAK_SIDE) for side in shape]
        matrix = torch.ones(sides, dtype=dtype or weight.dtype, device=weight.device)
        for rows in _PEAK_ROWS if weight.device.type == "cpu" else _ACCELERATOR_ROWS:
            for factor in (matrix, matrix.t()):
                left = torch.ones(rows, factor.shape[0], dtype=matrix.dtype, device=matrix.device)
                seconds = min(timed(partial(torch.matmul, left, factor), left.device) for _ in range(repeats))
                best = max(best, 2.0 * rows * matrix.numel() / seconds)
    return best


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work` on a device."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def _products(model: nn.Module, groups: Sequence[Group]) -> list[tuple[bool, float]]:
    """Of each matrix of the model: whether it is trained, and the operations of its product in the forward pass."""
    positions, (body, head) = necessary_positions(groups), _body_and_head(model)
    counted = [(trained, 2.0 * positions.tokens * weight.numel()) for trained, weight in body]
    return counted + [(trained, 2.0 * positions.rows * weight.numel()) for trained, weight in head]


def _attention(model: nn.Module, groups: Sequence[Group]) -> float:
    """q·k and p·v of every pair, head and layer."""
    config: Any = base_of(model).config.get_text_config()
    heads = widest(config, "num_attention_heads") or 0  # Mamba and RWKV have none
    size = widest(config, "head_dim") or config.hidden_size // max(heads, 1)
    return 4.0 * necessary_positions(groups).pairs * size * heads * config.num_hidden_layers


def _body_and_head(model: nn.Module) -> tuple[list[tuple[bool, Tensor]], list[tuple[bool, Tensor]]]:
    base = base_of(model)
    head = base.get_output_embeddings()
    return matrices(body_of(base)), [] if head is None else matrices(head)


def matrices(module: nn.Module) -> list[tuple[bool, Tensor]]:
    """The weights of all linear layers, each with whether it is trained; packed bits in the shape they stand for."""
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, nn.Linear | Conv1D)]
    return [(bool(layer.weight.requires_grad), _unpacked(layer)) for layer in layers]


def _unpacked(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    if weight.is_floating_point():
        return weight
    one = torch.empty(1, dtype=getattr(layer, "compute_dtype", None), device=weight.device)
    return one.expand(layer.out_features, layer.in_features)
