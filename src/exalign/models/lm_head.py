"""Log-probabilities of tokens without the logits of a batch in memory: a few rows of the vocabulary at a time.

For a hidden state h and a token v, logp = log softmax(z)[v] with z = cap · tanh(s (W h + b) / cap) / τ, where most
models have s = 1 and no cap. With p = softmax(z), d_j = ∂z_j/∂(W h + b)_j and the incoming gradient g_t of each token:

    ∂L/∂h = Σ_t g_t (d_v W_v − (p ∘ d) W)        ∂L/∂W = Σ_t g_t (d_v e_v − p ∘ d) hᵀ

so (p ∘ d) W is computed for unit weight in the forward pass, while the tile of p is there, and the g_t are folded in
backward: one pass over the vocabulary gives the value and the gradient of h, whatever the objective. The gradient
of W reuses the tiles of p ∘ d that fit (`head_bytes`), and computes the others again.

The input embedding and the head are by far the largest matrices of a small model, and often one and the same. Autograd
would allocate, fill with zeros and add such a matrix once per use and micro-batch; here a use can add its rows or its
product to `.grad` directly. Only `PackedPolicy` does so, whose result is for `backward()`: under `torch.autograd.grad`
these gradients would land in `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from exalign.device import device_memory

KEPT_BYTES = 160 * 2**20  # all tiles of a micro-batch of 768 completion tokens of GPT-2, the best size on CPUs
TILE_BYTES = 30 * 2**20  # below glibc's largest mapping threshold, so that tiles reuse memory and fault no pages
_MIN_ROWS, _MAX_ROWS = 64, 4096
_KEPT_SHARE, _TILE_SHARE = 16, 128  # of an accelerator's memory, as divisors


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What a model does to W h + b before the softmax: times `scale`, then capped softly at ± `cap`, then / τ."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """s / τ: what remains of d where nothing is capped."""
        return self.scale / self.temperature

    def apply_(self, logits: Tensor) -> Tensor:
        """The mapped logits, written over the given ones."""
        if self.cap is None:
            return logits if self.factor == 1.0 else logits.mul_(self.factor)
        return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)

    def slope(self, mapped: Tensor) -> Tensor | float:
        """d = ∂z/∂(W h + b), from the mapped logits z."""
        if self.cap is None:
            return self.factor
        return self.factor * (1 - (mapped * (self.temperature / self.cap)).square())


def token_logprobs(
    hidden: Tensor,
    head: nn.Module,
    rows: Tensor,
    targets: Tensor,
    *,
    logit_map: LogitMap = LogitMap(),
    add_in_place: bool = False,
    host_rows: Tensor | None = None,
) -> Tensor:
    """log softmax(z)[target] in nats `[T]`, float32 (float64 for float64), differentiable in hidden and the head.

    `hidden` `[R, H]`; token t is `targets[t]`, predicted by `hidden[rows[t]]`; `rows` does not decrease. A plain
    linear head takes the fast way; any other module (an adapter on the head, a quantised head) is called on a few
    rows at a time under activation checkpointing. With `add_in_place` the weight's gradient is added to its `.grad`
    directly where that is safe. `host_rows`: the rows on the CPU, where the caller has them, to wait for no device.
    """
    host_rows = rows.cpu() if host_rows is None else host_rows
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return _through_module(hidden, head, rows, host_rows, targets, logit_map)
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    hidden = hidden.to(weight.dtype)
    differentiate = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    into = weight if add_in_place and may_add_in_place(weight) else None
    with torch.autocast(device, enabled=False):
        how = _Backward(differentiate, into, host_rows)
        return _TokenLogprobs.apply(hidden, weight, bias, rows, targets, logit_map, how)


@dataclass(frozen=True, slots=True, eq=False)
class _Backward:
    """Whether there will be a backward pass, and the parameter whose `.grad` takes the weight's gradient, if any.

    And the rows on the CPU.
    """

    wanted: bool
    into: Tensor | None
    rows: Tensor


def head_bytes(memory: float | None) -> tuple[int, int]:
    """Bytes of the tiles kept for the backward pass, and of one tile: shares of a device's memory, if it has one."""
    if memory is None:
        return KEPT_BYTES, TILE_BYTES
    return max(KEPT_BYTES, int(memory / _KEPT_SHARE)), max(TILE_BYTES, int(memory / _TILE_SHARE))


def _tile_rows(vocabulary: int, tile_bytes: int) -> int:
    """As many rows as `tile_bytes` of float32 hold, within reason."""
    return max(_MIN_ROWS, min(_MAX_ROWS, tile_bytes // (4 * vocabulary)))


def _tiles(host_rows: Tensor, num_rows: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Slices of at most `size` hidden rows, each with the slice of the tokens that they predict."""
    begins = [*range(0, num_rows, size), num_rows]
    ends = torch.searchsorted(host_rows, torch.tensor(begins)).tolist()
    for i in range(len(begins) - 1):
        yield slice(begins[i], begins[i + 1]), slice(ends[i], ends[i + 1])


def _through_module(
    hidden: Tensor, head: nn.Module, rows: Tensor, host_rows: Tensor, targets: Tensor, logit_map: LogitMap
) -> Tensor:
    def tile(part: Tensor, local_rows: Tensor, wanted: Tensor) -> Tensor:
        logits = head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_map.scale
        if logit_map.cap is not None:
            logits = torch.tanh(logits / logit_map.cap) * logit_map.cap
        return torch.log_softmax(logits / logit_map.temperature, dim=-1)[local_rows, wanted]

    parts = [
        checkpoint(tile, hidden[span], rows[tokens] - span.start, targets[tokens], use_reentrant=False)
        for span, tokens in _tiles(host_rows, len(hidden), _MIN_ROWS)
    ]
    return torch.cat(parts)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        targets: Tensor,
        logit_map: LogitMap,
        backward: _Backward,
    ) -> Tensor:
        vocabulary, accurate = len(weight), torch.promote_types(weight.dtype, torch.float32)
        kept_bytes, tile_bytes = head_bytes(device_memory(hidden.device))
        size = min(_tile_rows(vocabulary, tile_bytes), len(hidden))
        needs_hidden = backward.wanted and ctx.needs_input_grad[0]
        needs_head = backward.wanted and any(ctx.needs_input_grad[1:3])
        rows_kept = kept_bytes // (vocabulary * accurate.itemsize) if needs_head else 0
        logp = hidden.new_empty(len(targets), dtype=accurate)
        slopes = torch.empty_like(logp)
        peaks, scales = hidden.new_empty(2, len(hidden), 1, dtype=accurate)
        expected = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)  # (p ∘ d) W, for unit weight
        kept: list[Tensor] = []
        scratch = hidden.new_empty(size if len(hidden) > rows_kept else 0, vocabulary, dtype=accurate)
        factors = _factors(weight)
        for span, tokens in _tiles(backward.rows, len(hidden), size):
            tile = scratch[: span.stop - span.start]
            if span.stop <= rows_kept:
                tile = hidden.new_empty(span.stop - span.start, vocabulary, dtype=accurate)
                kept.append(tile)
            _mapped_logits(hidden[span], factors, bias, logit_map, out=tile)
            local = rows[tokens] - span.start
            picked = tile[local, targets[tokens]]
            slopes[tokens] = logit_map.slope(picked)
            peaks[span] = tile.amax(dim=1, keepdim=True)
            totals = _exponentials_(tile, peaks[span], logit_map)
            logp[tokens] = picked - (peaks[span] + totals.log())[local, 0]
            scales[span] = logit_map.factor / totals
            if needs_hidden:
                torch.mm(tile.to(weight.dtype), weight, out=expected[span])
                expected[span] *= scales[span].to(expected.dtype)
        ctx.save_for_backward(hidden, weight, bias, rows, targets, slopes, peaks, scales, expected, *kept)
        ctx.logit_map, ctx.size, ctx.backward = logit_map, size, backward
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, rows, targets, slopes, _, _, expected, *_ = ctx.saved_tensors
        per_row = grad.new_zeros(len(hidden), 1).index_add_(0, rows, grad.unsqueeze(1))
        at_target = (grad * slopes).to(hidden.dtype).unsqueeze(1)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = expected * -per_row.to(hidden.dtype)
            grad_hidden.index_add_(0, rows, weight[targets] * at_target)
        if ctx.needs_input_grad[1] or (bias is not None and ctx.needs_input_grad[2]):
            grad_weight, grad_bias = _head_gradient(ctx, per_row, at_target)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


@cache
def _sums_wide(device: str, dtype: torch.dtype) -> bool:
    """Whether a device gives a product of factors in half precision as it sums it, in float32."""
    with suppress(RuntimeError, TypeError):  # a CPU has no such kernel
        factor = torch.ones(16, 16, dtype=dtype, device=device)
        torch.mm(factor, factor, out_dtype=torch.float32, out=factor.float())
        return True
    return False


def _factors(weight: Tensor) -> Tensor:
    """The weight as the factor of logits: half precision ends with it, for a logit rounded to 8 bits is wrong by up to
    0.06 nats where it is 16, which neither softmax nor the difference of two policies takes away again."""
    half = weight.dtype in (torch.float16, torch.bfloat16) and not _sums_wide(weight.device.type, weight.dtype)
    return weight.float() if half else weight


def _mapped_logits(hidden: Tensor, factors: Tensor, bias: Tensor | None, logit_map: LogitMap, *, out: Tensor) -> None:
    if factors.dtype == out.dtype:
        torch.mm(hidden.to(out.dtype), factors.t(), out=out)
    else:
        torch.mm(hidden, factors.t(), out_dtype=out.dtype, out=out)
    if bias is not None:
        out.add_(bias)
    logit_map.apply_(out)


def _exponentials_(tile: Tensor, peaks: Tensor, logit_map: LogitMap) -> Tensor:
    """Turn mapped logits z into exp(z − peak), times the cap's slope where there is one; return their sums `[R, 1]`.

    The sums are before the slope. What is left for p ∘ d is the row's `factor / sum`, applied to the small side of
    each product instead of to the tile.
    """
    bend = None if logit_map.cap is None else logit_map.slope(tile) / logit_map.factor
    totals = tile.sub_(peaks).exp_().sum(dim=1, keepdim=True)
    if bend is not None:
        tile.mul_(bend)
    return totals


def _head_gradient(ctx: Any, per_row: Tensor, at_target: Tensor) -> tuple[Tensor | None, Tensor | None]:
    hidden, weight, bias, rows, targets, _, peaks, scales, _, *kept = ctx.saved_tensors
    into, row_weight = ctx.backward.into, -per_row * scales
    weighted = hidden * row_weight.to(hidden.dtype)
    # Summed over tokens in 16 bits, the gradient of a frequent one would stop growing.
    grad_weight = torch.zeros_like(weight, dtype=peaks.dtype) if into is None else gradient_of(into)
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=peaks.dtype)
    scratch = peaks.new_empty(ctx.size if len(kept) * ctx.size < len(hidden) else 0, len(weight))
    factors = _factors(weight) if len(scratch) else weight
    for number, (span, _) in enumerate(_tiles(ctx.backward.rows, len(hidden), ctx.size)):
        if number < len(kept):
            tile = kept[number]
        else:
            tile = scratch[: span.stop - span.start]
            _mapped_logits(hidden[span], factors, bias, ctx.logit_map, out=tile)
            _exponentials_(tile, peaks[span], ctx.logit_map)
        _add_product_(grad_weight, tile.to(weight.dtype).t(), weighted[span])
        if grad_bias is not None:
            grad_bias.add_((row_weight[span].t() @ tile)[0])
    grad_weight.index_add_(0, targets, (hidden[rows] * at_target).to(grad_weight.dtype))
    if grad_bias is not None:
        grad_bias.index_add_(0, targets, at_target[:, 0].to(grad_bias.dtype))
    return (grad_weight if into is None else None), grad_bias


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add to a total that may be of a wider type than the product's factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def may_add_in_place(parameter: Tensor | None) -> bool:
    """Whether nothing waits for this gradient: a trained leaf without hooks, in a single process.

    Distributed training reduces a gradient when autograd delivers it, so there it must be delivered.
    """
    return (
        parameter is not None
        and parameter.is_leaf
        and parameter.requires_grad
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
    )


def gradient_of(parameter: Tensor) -> Tensor:
    """`parameter.grad`, zeros if it was not there, of the type that its gradients are summed in."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
    return parameter.grad


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether the module only looks up rows, so that `embed` stands for it."""
    return (
        type(module) is nn.Embedding
        and module.max_norm is None
        and not (module.scale_grad_by_freq or module.sparse or module._forward_hooks or module._forward_pre_hooks)
    )


def embed(input_ids: Tensor, embedding: nn.Embedding) -> Tensor:
    """Rows of the embedding `[…, H]`; backward adds their gradients to the weight's `.grad` in place."""
    return _Embed.apply(input_ids, embedding.weight, embedding.padding_idx)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return weight[input_ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ids, grad = ctx.saved_tensors[0].flatten(), grad.flatten(0, -2)
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((ids == ctx.padding_idx).unsqueeze(1), 0.0)
        total = gradient_of(ctx.weight)
        total.index_add_(0, ids, grad.to(total.dtype))
        return None, None, None
