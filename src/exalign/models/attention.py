"""Exact attention in which a prompt is shared by its completions, inside transformers models that were not changed.

`share_prompts(model)` points the model's attention at functions registered with transformers. They behave as the
model's own until a layout stands where the attention mask would be. It gets there because transformers asks the
registered mask function for a mask and hands whatever it returns to every layer; so no mask is ever built, and a layer
that activation checkpointing computes a second time still has it. Windows, soft caps and grouped queries are met here.

In training a `TreeLayout` says who sees whom. On a CPU a tree is attended to by the flash kernel that returns the
log-sum-exp: `[prompt | leaf_1]` is one causal call, every further leaf one causal call to itself, and all further
leaves one full call to the prompt, merged by out = w out_self + (1 − w) out_prompt, w = σ(lse_self − lse_prompt).
Elsewhere FlexAttention runs with a block mask. In decoding a `StepLayout` does: whole prompts that enter, then one
token of each live completion, which attends to the prompt's keys, read once for all completions of the group, and to
its own completion's, merged in the same way. On an accelerator a `PagedLayout` does, whose cost in launches does not
grow with the groups.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from exalign.device import to_device
from exalign.models.prefix_tree import BLOCK, Tree, TreeLayout, mask_parts

_PREFIX = "sharing_over_"
_FIRST_CAPACITY = 32
_KINDS = 128
_NARROWEST = 16  # the smallest head that FlexAttention takes
_log = logging.getLogger(__name__)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class UnsupportedAttentionError(Exception):
    """This architecture asks for an attention that is not computed here; the message says which."""


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


@dataclass(frozen=True, eq=False)
class StepLayout:
    """Which tokens of the row belong to whom: `entering` groups' prompts, then one token per live row of `running`."""

    entering: list[SharedCache]
    running: list[SharedCache]
    window: int | None = None

    def with_window(self, window: int | None) -> StepLayout:
        """This layout seen by a layer with a sliding window."""
        return self if window is None or window == self.window else replace(self, window=window)


@dataclass(eq=False)
class Pages:
    """Keys and values of many texts, per layer `[2, H, slots, D]`, in `count` pages of `BLOCK` slots."""

    count: int = 0
    stored: list[Tensor] = field(default_factory=list)

    def put(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> Tensor:
        """All that is stored of a layer, with these tokens' `[1, H, N, D]` in `slots`; what was never written is 0."""
        if layer == len(self.stored):
            self.stored.append(key.new_zeros(2, key.shape[1], 0, key.shape[3]))
        stored = self.stored[layer]
        if stored.shape[2] < self.count * BLOCK:
            self.stored[layer] = stored = pad(stored, (0, 0, 0, self.count * BLOCK - stored.shape[2]))
        return stored.index_copy_(2, slots, torch.cat([key, value]))


@dataclass(frozen=True, eq=False)
class PagedLayout:
    """A row of tokens: whole `prompts`, then the last token of each of R completions; they go into `slots` of `pages`.

    `rows`, on the device: of each completion its segment, its prompt's and its position `[R]`; of each page whose
    segment it holds, the position of its first slot, and its number of tokens; how many pages a completion sees, and
    which, `[R, 1, 1]` and `[R, 1, 1, L]`. `masks` are made of them, by window.
    """

    pages: Pages
    prompts: TreeLayout | None
    slots: Tensor
    rows: list[Tensor]
    window: int | None = None
    masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def with_window(self, window: int | None) -> PagedLayout:
        """This layout seen by a layer with a sliding window."""
        return self if window is None or window == self.window else replace(self, window=window)


Layout = TreeLayout | StepLayout | PagedLayout
current_layout: ContextVar[Layout | None] = ContextVar("exalign_layout", default=None)
"""The layout by which a row is being read, if any."""


def share_prompts(model: PreTrainedModel) -> None:
    """Point the model's attention at the functions here. Without a layout it computes what it computed before."""
    original = str(model.config._attn_implementation)
    if original.startswith(_PREFIX):
        return
    name = _PREFIX + original
    AttentionInterface.register(name, partial(_attention, original))
    AttentionMaskInterface.register(name, partial(_mask, original))
    model.config._attn_implementation = name


def use_own_attention(model: PreTrainedModel) -> None:
    """Undo `share_prompts`."""
    model.config._attn_implementation = model.config._attn_implementation.removeprefix(_PREFIX)


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """While open, a model under `share_prompts` reads its row of tokens by this layout."""
    token = current_layout.set(layout)
    try:
        yield
    finally:
        current_layout.reset(token)


def _mask(original: str, *args: Any, **kwargs: Any) -> Any:
    """What transformers calls for a mask: the layout, or the mask of the model's own attention."""
    layout = current_layout.get()
    if layout is None:
        own: Callable[..., Any] | None = AttentionMaskInterface._global_mapping.get(original)  # type: ignore[assignment]
        return None if own is None else own(*args, **kwargs)
    if kwargs.get("use_vmap"):
        raise UnsupportedAttentionError("it changes the causal mask")
    return layout.with_window(kwargs.get("local_size"))


def _attention(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for attention: query `[1, H, N, D]`, key and value with as many or fewer heads."""
    if not isinstance(attention_mask, Layout):
        own: Callable[..., Any] | None = AttentionInterface._global_mapping.get(original)
        if own is None:  # "eager" is not in the table: each modelling file has its own
            own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, attention_mask, **kwargs)
    for name in ("s_aux", "position_bias", "sinks", "head_mask"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttentionError(f"its attention takes {name}")
    if kwargs.get("dropout"):
        raise UnsupportedAttentionError("its attention has dropout")
    if not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError("its attention is not causal")
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Under autocast some models rotate queries and keys in float32 beside half precision values; kernels want one type.
    query, key, value = (states.to(value.dtype) for states in (query, key, value))
    layout, softcap = attention_mask.with_window(kwargs.get("sliding_window")), kwargs.get("softcap")
    if isinstance(layout, StepLayout):
        return _step_attention(module, query, key, value, layout, scale, softcap), None
    if isinstance(layout, PagedLayout):
        return paged_attention(module.layer_idx, query, key, value, layout, scale=scale, softcap=softcap), None  # type: ignore[arg-type]
    if query.device.type != "cpu" and _is_wide_enough(query, value):
        found = flex_tree_attention(query, key, value, layout, scale=scale, softcap=softcap)
        return found.contiguous(), None  # as transformers' own: some models take a view of it
    key, value = (repeat_heads(states, query.shape[1]) for states in (key, value))
    flash = query.device.type == "cpu" and softcap is None and value.shape[-1] == query.shape[-1]
    if flash and layout.window is None:
        return merged_tree_attention(query, key, value, layout, scale=scale), None
    return dense_tree_attention(query, key, value, layout, scale=scale, softcap=softcap).contiguous(), None


def repeat_heads(states: Tensor, num_heads: int) -> Tensor:
    """`[1, G, N, D]` → `[1, H, N, D]`, each of the G heads H / G times in a row."""
    repeats = num_heads // states.shape[1]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def merged_tree_attention(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, scale: float) -> Tensor:
    """Tree attention by merged flash calls (CPU): `[1, H, N, D]` each → `[1, N, H, D]`."""
    return _MergedFlash.apply(query, key, value, layout, scale)


def dense_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Tree by tree with a dense mask: the slow twin, and the way for windows and capped scores on a CPU."""
    outputs = []
    for tree in layout.trees:
        q, k, v = (states[:, :, tree.start : tree.end] for states in (query, key, value))
        hidden = ~layout.alone(tree).dense_mask(query.device)
        scores = _scores(q, k, scale, softcap).masked_fill(hidden, -torch.inf)
        outputs.append(scores.softmax(-1).to(v.dtype) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scaled and capped scores, at least in float32."""
    scores = query @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def flex_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Tree attention by FlexAttention: `[1, H, N, D]` and as many or fewer heads of keys → `[1, N, H, D]`."""
    mask = layout.masks.get(layout.window)
    if not isinstance(mask, BlockMask):
        parts = to_device(query.device, *mask_parts(layout)) if mask is None else mask
        mask = layout.masks[layout.window] = block_mask(parts, layout.window)
    return fused(query, key, value, mask, scale=scale, softcap=softcap).transpose(1, 2)


def block_mask(parts: Sequence[Tensor], window: int | None) -> BlockMask:
    """FlexAttention's mask of the `mask_parts` of a row."""
    segment, prompt, position, number, indices, full_number, full_indices = parts
    width = window or 0

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        related = (segment[k] == segment[q]) | (segment[k] == prompt[q])
        return related & (position[k] <= position[q])

    def seen_near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen(batch, head, q, k) & (position[q] - position[k] < width)

    return BlockMask.from_kv_blocks(
        number,
        indices,
        full_number,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=seen if window is None else seen_near,
        seq_lengths=(len(segment), len(segment)),
        compute_q_blocks=torch.is_grad_enabled(),
    )


def fused(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float, softcap: float | None) -> Tensor:
    """FlexAttention, compiled once for all lengths: `[1, H, Q, D]` and as many or fewer heads of keys."""
    cap = softcap or 1.0

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    key, value = _divisible(query, key, value)
    return _compiled_flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
        kernel_options=_blocks(query),
    )


def _blocks(query: Tensor) -> Any:
    """Smaller blocks where torch's usual ones need more shared memory than an A100 has: for heads of a size for which
    it has no blocks of its own, of 80 in float32 and of 160 in any type (`make compile-cuda`).
    """
    width, whole = query.shape[-1], query.dtype == torch.float32
    if query.device.type == "cpu" or width in (64, 128, 256) or not (whole or width > 128):
        return None
    return {"fwd_BLOCK_N": 16 if whole and width > 128 else 32}


def paged_attention(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """One step of decoding on a device: `[1, H, N, D]` and as many or fewer heads of keys → `[1, N, H, D]`.

    One kernel for the prompts, one for all completions, however many there are.
    """
    if not _is_wide_enough(query, value):
        raise UnsupportedAttentionError("its heads are too narrow for FlexAttention")
    key, value = _divisible(query, key, value)
    stored = layout.pages.put(layer, key, value, layout.slots)
    outputs, read = [], 0
    if layout.prompts is not None:
        read = layout.prompts.num_tokens
        q, k, v = (states[:, :, :read] for states in (query, key, value))
        prompts = layout.prompts.with_window(layout.window)
        outputs.append(flex_tree_attention(q, k, v, prompts, scale=scale, softcap=softcap))
    if read < query.shape[2]:
        if layout.window not in layout.masks:
            layout.masks[layout.window] = _page_mask(layout.rows, stored.shape[2], layout.window)
        rows = query[:, :, read:].transpose(0, 2)
        # The kernel for short queries wants to know how many there are; the decoder rounds the number up.
        torch._dynamo.mark_static(rows, 0)
        out = fused(rows, stored[:1], stored[1:], layout.masks[layout.window], scale=scale, softcap=softcap)
        outputs.append(out.permute(2, 0, 1, 3))
    return torch.cat(outputs, dim=1)


def _page_mask(rows: Sequence[Tensor], slots: int, window: int | None) -> BlockMask:
    """FlexAttention's mask of one query for each completion, over all slots: its own pages, and in them its past."""
    segment, prompt, position, holds, begins, filled, number, indices = rows
    width = window or 0

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        page, place = k // BLOCK, k % BLOCK
        related = (holds[page] == segment[batch]) | (holds[page] == prompt[batch])
        return related & (place < filled[page]) & (begins[page] + place <= position[batch])

    def seen_near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen(batch, head, q, k) & (position[batch] - begins[k // BLOCK] - k % BLOCK < width)

    return BlockMask.from_kv_blocks(
        number,
        indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=seen if window is None else seen_near,
        seq_lengths=(1, slots),
        compute_q_blocks=False,
    )


def _divisible(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that the kernels can divide among the query heads: a power of two of those for each."""
    heads, ratio = query.shape[1], query.shape[1] // key.shape[1]
    return (repeat_heads(key, heads), repeat_heads(value, heads)) if ratio & (ratio - 1) else (key, value)


def _is_wide_enough(query: Tensor, value: Tensor) -> bool:
    """Whether FlexAttention can take heads of this size; a sentence, once, where it cannot."""
    width = min(query.shape[-1], value.shape[-1])
    if width < _NARROWEST:
        _say_narrow(width)
    return width >= _NARROWEST


@lru_cache(maxsize=1)
def _say_narrow(width: int) -> None:
    _log.warning("Heads of size %d are too narrow for FlexAttention, which takes %d; a slower way.", width, _NARROWEST)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    # Beyond this many kinds of model and mask in a process torch would silently compute all scores.
    torch._dynamo.config.recompile_limit = max(_KINDS, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention)


def _step_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, layout: StepLayout, scale: float, softcap: float | None
) -> Tensor:
    """One step of decoding: `[1, H, N, D]` each → `[1, N, H, D]`; the caches take the new keys and values."""
    outputs: list[Tensor] = []
    start = 0
    for cache in layout.entering:
        part = slice(start, start + cache.prompt_length)
        q, k, v = query[:, :, part], key[:, :, part], value[:, :, part]
        outputs.append(_prompt_attention(q, k, v, layout.window, scale, softcap)[0])
        cache.prompt.append(torch.cat([k, v]))
        start = part.stop
    for cache in layout.running:
        part = slice(start, start + cache.num_rows)
        q, k, v = (states[0, :, part].transpose(0, 1) for states in (query, key, value))
        own = cache.append(module.layer_idx, k, v)
        outputs.append(_branch_attention(q, cache.prompt[module.layer_idx], own, layout.window, scale, softcap))
        start = part.stop
    return torch.cat(outputs)[None]


def _prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float, softcap: float | None
) -> Tensor:
    """Causal attention of one prompt to itself, `[1, P, H, D]`."""
    heads, length = query.shape[1:3]
    if softcap is None and (window is None or length <= window):
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=heads != key.shape[1]
        )
        return out.transpose(1, 2)
    alone = TreeLayout((Tree(0, length, ()),), length, window)
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    return dense_tree_attention(query, key, value, alone, scale=scale, softcap=softcap)


def _branch_attention(
    query: Tensor, prompt: Tensor, own: Tensor, window: int | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention of R completions' last tokens, query `[R, Hq, D]`, to the prompt and to their own tokens."""
    rows, query_heads, width = query.shape
    heads, prompt_length, length = own.shape[2], prompt.shape[2], own.shape[3]
    first = 0 if window is None else max(0, prompt_length + length - window)
    seen = own[:, :, :, max(0, first - prompt_length) :]
    grouped = query.reshape(rows, heads, query_heads // heads, width)
    out, lse = _attend(grouped, seen[0], seen[1], scale, softcap)
    if first < prompt_length:
        # The R completions are R × (query heads per key head) queries of one batch entry: the prompt is read once.
        folded = grouped.transpose(0, 1).reshape(1, heads, -1, width)
        p_out, p_lse = _attend(folded, prompt[:1, :, first:], prompt[1:, :, first:], scale, softcap)
        p_out = p_out[0].reshape(heads, rows, -1, p_out.shape[-1]).transpose(0, 1)
        p_lse = p_lse[0].reshape(heads, rows, -1).transpose(0, 1)
        out = torch.lerp(out, p_out, torch.sigmoid(p_lse - lse)[..., None].to(out.dtype))
    return out.reshape(rows, query_heads, -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention without a mask, `[B, H, Q, D]` to `[B, H, L, D]`, and its log-sum-exp `[B, H, Q]`."""
    if query.device.type == "cpu" and softcap is None and value.shape[-1] == query.shape[-1]:
        return _flash(query, key, value, 0.0, False, scale=scale)
    scores = _scores(query, key, scale, softcap)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


class _MergedFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float) -> Tensor:
        _, heads, tokens, size = query.shape
        out = query.new_empty(1, tokens, heads, size)
        lse = query.new_empty(1, tokens, heads, dtype=torch.promote_types(query.dtype, torch.float32))
        by_head, lse_by_head = out.transpose(1, 2), lse.transpose(1, 2)

        def attend(begin: int, end: int) -> None:
            q, k, v = (states[:, :, begin:end] for states in (query, key, value))
            by_head[:, :, begin:end], lse_by_head[:, :, begin:end] = _flash(q, k, v, 0.0, True, scale=scale)

        for tree in layout.trees:
            chain, leaves, rest = _calls(tree)
            attend(tree.start, chain)
            for begin, end in leaves:
                attend(begin, end)
            if rest:
                prompt = slice(tree.start, tree.start + tree.prompt_length)
                q, k, v = query[:, :, chain : tree.end], key[:, :, prompt], value[:, :, prompt]
                _merge(
                    by_head[:, :, chain : tree.end], lse_by_head[:, :, chain : tree.end], *_flash(q, k, v, scale=scale)
                )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *states, lse = ctx.saved_tensors
        # torch 2.13's kernel takes up to 14 times as long in half precision as in float32.
        query, key, value, out, grad_out = (state.to(lse.dtype) for state in (*states, grad_out))
        out, lse, grad_out = out.transpose(1, 2), lse.transpose(1, 2), grad_out.transpose(1, 2)
        # In the memory order of the interface's outputs, [1, N, H, D], so that what follows needs no copy.
        grads = [torch.empty_like(out.transpose(1, 2)).transpose(1, 2) for _ in range(3)]

        # Both halves get the merged output and log-sum-exp: their probabilities are then those of the whole softmax.
        def backward(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            g, q, o, s = (states[:, :, queries] for states in (grad_out, query, out, lse))
            return _flash_backward(g, q, key[:, :, keys], value[:, :, keys], o, s, 0.0, causal, scale=ctx.scale)

        for tree in ctx.layout.trees:
            chain, leaves, rest = _calls(tree)
            for begin, end in [(tree.start, chain), *leaves]:
                span = slice(begin, end)
                for grad, part in zip(grads, backward(span, span, True), strict=True):
                    grad[:, :, span] = part
            if rest:
                queries, prompt = slice(chain, tree.end), slice(tree.start, tree.start + tree.prompt_length)
                spans = (queries, prompt, prompt)
                for grad, part, span in zip(grads, backward(queries, prompt, False), spans, strict=True):
                    grad[:, :, span] += part
        return *(grad.to(states[0].dtype) for grad in grads), None, None


def _calls(tree: Tree) -> tuple[int, list[tuple[int, int]], bool]:
    """End of the chain `[prompt | leaf_1]`, the further leaves that have tokens, and whether there are any."""
    spans = tree.leaf_spans
    chain = spans[0][1] if spans else tree.start + tree.prompt_length
    leaves = [(begin, end) for begin, end in spans[1:] if end > begin]
    return chain, leaves, bool(leaves)


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Fold a second softmax over other keys into the first, in place: out `[1, H, n, D]`, lse `[1, H, n]`."""
    weight = torch.sigmoid(other_lse - lse)
    out.lerp_(other_out, weight.unsqueeze(-1).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, other_lse))
