"""Attention in which the completions of one prompt share its keys and values.

Tokens of all groups stand in one row, without padding: first whole prompts that enter, then one token for each live
completion. A prompt attends to itself causally. A completion's token attends to the prompt's keys, read once for all
the completions of the group, and to its own completion's keys; the two partial results are merged by their
log-sum-exp, which gives softmax attention over both key sets, exactly.

It plugs into unmodified transformers models through `AttentionInterface`, for the length of one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "exalign_shared_prompt"
_FIRST_CAPACITY = 32


class UnsupportedAttentionError(Exception):
    """The model asks for a kind of attention that this file does not compute."""


@dataclass(eq=False)
class SharedCache:
    """Keys and values of one group: per layer, the prompt's `[2, H, P, D]` and the completions' `[2, R, H, T, D]`.

    `length` counts the tokens of each live completion that are in the cache; room for more is added by doubling.
    """

    prompt: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    num_rows: int = 0
    prompt_length: int = 0
    length: int = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> Tensor:
        """Add one token's `[R, H, D]` keys and values to each completion; returns `[2, R, H, length + 1, D]`."""
        if layer == len(self.rows):
            heads, width = key.shape[1:]
            self.rows.append(key.new_empty(2, self.num_rows, heads, _FIRST_CAPACITY, width))
        stored = self.rows[layer]
        if stored.shape[3] == self.length:
            grown = stored.new_empty(*stored.shape[:3], 2 * self.length, stored.shape[4])
            grown[:, :, :, : self.length] = stored
            self.rows[layer] = stored = grown
        stored[0, : self.num_rows, :, self.length] = key
        stored[1, : self.num_rows, :, self.length] = value
        return stored[:, : self.num_rows, :, : self.length + 1]

    def keep(self, rows: list[int]) -> None:
        """Forget the completions that are not in `rows` (ascending): the live ones move into the freed places."""
        for stored in self.rows:
            for place, row in enumerate(rows):
                if place != row:
                    stored[:, place, :, : self.length] = stored[:, row, :, : self.length]
        self.num_rows = len(rows)


@dataclass(eq=False)
class Layout:
    """Which tokens of the row belong to whom: `entering` groups' prompts, then one token per live row of `running`."""

    entering: list[SharedCache]
    running: list[SharedCache]


_layout: ContextVar[Layout] = ContextVar("exalign_shared_prompt_layout")


@contextmanager
def shared_attention(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Within the block, `model` computes its attention by `layout`; afterwards it is as it was."""
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    token = _layout.set(layout)
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        _layout.reset(token)


def shared_prompt_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer: query `[1, Hq, N, D]`, key and value `[1, H, N, D]`.

    Returns `[1, N, Hq, D]`. A sliding window of w lets a token see itself and the w − 1 before it.
    """
    _check_supported(module, sliding_window, options)
    layout = _layout.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = options.get("softcap")
    outputs, start = [], 0
    for cache in layout.entering:
        part = slice(start, start + cache.prompt_length)
        q, k, v = query[:, :, part], key[:, :, part], value[:, :, part]
        outputs.append(_causal(q, k, v, scale, softcap, sliding_window)[0].transpose(0, 1))
        cache.prompt.append(torch.cat([k, v]))
        start = part.stop
    for cache in layout.running:
        part = slice(start, start + cache.num_rows)
        q, k, v = (states[0, :, part].transpose(0, 1) for states in (query, key, value))
        own = cache.append(module.layer_idx, k, v)
        outputs.append(_branches(q, cache.prompt[module.layer_idx], own, scale, softcap, sliding_window))
        start = part.stop
    return torch.cat(outputs)[None], None


def _no_mask(*arguments: Any, **options: Any) -> None:
    """The layout says who sees whom: no mask is built."""


AttentionInterface.register(NAME, shared_prompt_attention)
AttentionMaskInterface.register(NAME, _no_mask)


def _check_supported(module: Any, sliding_window: int | None, options: dict[str, Any]) -> None:
    for name in ("position_bias", "s_aux", "head_mask"):
        if options.get(name) is not None:
            raise UnsupportedAttentionError(f"its attention uses {name}")
    kinds = getattr(module.config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else "full_attention"
    if kind not in ("full_attention", "sliding_attention"):
        raise UnsupportedAttentionError(f"its layers use {kind}")
    if kind == "sliding_attention" and sliding_window is None and getattr(module.config, "sliding_window", None):
        raise UnsupportedAttentionError("its attention does not state its sliding window")
    if not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError("its attention is not causal")


def _branches(
    query: Tensor, prompt: Tensor, own: Tensor, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Attention of R completions' last tokens, query `[R, Hq, D]`, to the prompt and to their own tokens."""
    rows, query_heads, width = query.shape
    heads, prompt_length, length = own.shape[2], prompt.shape[2], own.shape[3]
    first = 0 if window is None else max(0, prompt_length + length - window)
    seen = own[:, :, :, max(0, first - prompt_length) :]
    grouped = query.reshape(rows, heads, query_heads // heads, width)
    out, lse = attend(grouped, seen[0], seen[1], scale, softcap)
    if first < prompt_length:
        # The R completions are R × (query heads per key head) queries of one batch entry: the prompt is read once.
        folded = grouped.transpose(0, 1).reshape(1, heads, -1, width)
        p_out, p_lse = attend(folded, prompt[:1, :, first:], prompt[1:, :, first:], scale, softcap)
        p_out = p_out[0].reshape(heads, rows, -1, width).transpose(0, 1)
        p_lse = p_lse[0].reshape(heads, rows, -1).transpose(0, 1)
        out = torch.lerp(out, p_out, torch.sigmoid(p_lse - lse)[..., None].to(out.dtype))
    return out.reshape(rows, query_heads, width)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention without a mask, `[B, H, Q, D]` to `[B, H, L, D]`, and its log-sum-exp `[B, H, Q]`."""
    if query.device.type == "cpu" and softcap is None and value.shape[-1] == query.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, scale=scale)
    scores = _capped(query @ key.transpose(-1, -2) * scale, softcap)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Causal attention of one prompt to itself, within the window where there is one."""
    length = query.shape[2]
    if softcap is None and (window is None or length <= window):
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    mask = mask if window is None else mask.triu(1 - window)
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    scores = _capped(query @ key.transpose(-1, -2) * scale, softcap).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(value.dtype) @ value
