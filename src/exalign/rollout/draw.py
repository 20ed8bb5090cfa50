"""Tokens from logits: one uniform number in, one token and its log-probability out.

Letters: N rows of logits, M draws (several draws may share a row), V vocabulary.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_BLOCK = 256  # tokens whose weights are summed before the search: the float64 running sum is over V / 256 blocks
_TILE = 8  # rows of logits handled at once, so that a tile and its weights stay in the processor's cache


def prompt_uniforms(seed: int, prompt_id: str, num_completions: int, length: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 `[num_completions, length]`, one for each token that may be drawn.

    Row j is a function of `seed`, `prompt_id` and j alone: neither the other prompts, nor K, nor the longest length
    allowed change the numbers that a completion is drawn with.

    >>> few, many = prompt_uniforms(0, "a", 2, 3), prompt_uniforms(0, "a", 4, 5)
    >>> bool((few == many[:2, :3]).all())
    True
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{prompt_id}".encode()).digest()[:16], "little")
    rows = [np.random.Generator(np.random.Philox(key=key, counter=j << 192)) for j in range(num_completions)]
    return np.stack([row.random(length) for row in rows])


def draw_tokens(
    logits: Tensor,
    uniforms: Tensor,
    draws_per_row: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature) by inverting its cumulative distribution.

    `logits` `[N, V]`; `draws_per_row` int64 `[N]`, summing to M, says how many draws each row serves;
    `uniforms` float64 `[M]` in [0, 1), in the order of the rows. Returns ids int64 `[M]` and log-probabilities
    float64 `[M]` in nats. With `top_k` or `top_p` the tokens they leave out have probability zero, and the
    log-probability is that of the renormalised distribution. Sums are in float32 within blocks of 256 tokens (in
    float64 where the logits are) and in float64 across them.
    """
    ids, logps, start = [], [], 0
    for first in range(0, len(logits), _TILE):
        draws = draws_per_row[first : first + _TILE]
        stop = start + int(draws.sum())
        rows = torch.repeat_interleave(torch.arange(len(draws), device=logits.device), draws.to(logits.device))
        scaled = _scaled(logits[first : first + _TILE], temperature)
        if top_k is not None or top_p is not None:
            _filter(scaled, top_k, top_p)
        tile_ids, tile_logps = _invert(scaled, rows, uniforms[start:stop].to(logits.device))
        ids.append(tile_ids)
        logps.append(tile_logps)
        start = stop
    return torch.cat(ids), torch.cat(logps)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """`logits / temperature` in at least float32, in a new tensor whose width is a multiple of the block."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    width = -(-logits.shape[1] // _BLOCK) * _BLOCK
    scaled = torch.full((len(logits), width), -torch.inf, dtype=dtype, device=logits.device)
    torch.div(logits.to(dtype), temperature, out=scaled[:, : logits.shape[1]])
    return scaled


def _filter(scaled: Tensor, top_k: int | None, top_p: float | None) -> None:
    """Set to −inf, in place, what top-k and then top-p leave out; the most probable token always stays."""
    if top_k is not None:
        kth = scaled.topk(min(top_k, scaled.shape[1])).values[:, -1:]
        scaled.masked_fill_(scaled < kth, -torch.inf)
    if top_p is not None:
        ordered, order = scaled.sort(descending=True)
        probability = ordered.double().softmax(-1)
        before = probability.cumsum(-1) - probability
        scaled.masked_fill_((before >= top_p).scatter(1, order, before >= top_p), -torch.inf)


def _invert(scaled: Tensor, rows: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative weight exceeds the uniform's share of the total, and its log-probability."""
    top = scaled.amax(1, keepdim=True)
    weights = (scaled - top).exp_().view(len(scaled), -1, _BLOCK)
    cumulative = weights.sum(2).double().cumsum(1)[rows]
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, _just_below(total))
    block = torch.searchsorted(cumulative, target, right=True)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0.0)
    within = weights[rows, block[:, 0]].double().cumsum(1)
    # The block's own float64 total may differ from its float32 sum in the last digits: stay inside it.
    rest = torch.minimum(target - before, _just_below(within[:, -1:]))
    ids = block[:, 0] * _BLOCK + torch.searchsorted(within, rest, right=True)[:, 0]
    logps = (scaled[rows, ids].double() - top[rows, 0].double()) - total[:, 0].log()
    return ids, logps


def _just_below(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.zeros_like(values))
