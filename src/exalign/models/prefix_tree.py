"""Streams of trees: a prompt computed once for its K completions, a whole list of groups in one row, no padding.

A tree is `[prompt | leaf_1 | … | leaf_K]`. The prompt attends to itself causally; each leaf attends to the whole prompt
and causally to itself; the positions of every leaf restart at the prompt's length. So each path prompt + leaf computes
what it would compute alone in a row. The slower way, a padded row for each completion, stands below.

All that a micro-batch's tensors hold is known on the CPU, so it is built there, and goes to a device in one copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.device import to_device

BLOCK = 128  # tokens of a block of queries or keys, as FlexAttention divides them


@dataclass(frozen=True, slots=True)
class Tree:
    """Where one tree lies in the stream: it starts at `start`; its leaves follow its prompt in order."""

    start: int
    prompt_length: int
    leaf_lengths: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.prompt_length + sum(self.leaf_lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return self.prompt_length + max(self.leaf_lengths, default=0)

    @property
    def leaf_spans(self) -> list[tuple[int, int]]:
        """Begin and end of each leaf in the stream; equal where a leaf is empty."""
        spans, begin = [], self.start + self.prompt_length
        for length in self.leaf_lengths:
            spans.append((begin, begin + length))
            begin += length
        return spans


class Lineage(NamedTuple):
    """Of each token the number of its segment, the number of the prompt before that, and its position in its path.

    Segments are prompts and completions. A token sees those of its own segment and of its prompt whose position is not
    beyond its own. No token has the segment −1, so a place with that is seen by none.
    """

    segment: np.ndarray
    prompt: np.ndarray
    position: np.ndarray

    def tensors(self) -> list[Tensor]:
        return [torch.from_numpy(part.astype(np.int32)) for part in self]


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """What attention must know of a stream of `num_tokens` tokens; it travels in the place of the attention mask.

    `window` limits how far back a token sees along its own path: itself and the `window − 1` tokens before it. Each
    leaf is `unread` tokens shorter than its completion. `masks` holds what a device needs of it, by window.
    """

    trees: tuple[Tree, ...]
    num_tokens: int
    window: int | None = None
    unread: int = 0
    masks: dict[int | None, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return max(tree.longest for tree in self.trees)

    def with_window(self, window: int | None) -> TreeLayout:
        """This layout seen by a layer with a sliding window; a window that no path exceeds is no window."""
        unchanged = window is None or window >= self.longest or window == self.window
        return self if unchanged else replace(self, window=window)

    def lineage(self) -> Lineage:
        """Of each token of the stream."""
        lengths = [length for tree in self.trees for length in (tree.prompt_length, *tree.leaf_lengths)]
        segments = np.repeat(np.arange(len(lengths)), lengths)
        numbers, first = [], 0
        for tree in self.trees:
            numbers += [first] * (1 + len(tree.leaf_lengths))
            first = len(numbers)
        before = [n for tree in self.trees for n in (0, *[tree.prompt_length] * len(tree.leaf_lengths))]
        begins = np.cumsum([0, *lengths])[:-1]
        positions = np.arange(self.num_tokens) - (begins - np.array(before))[segments]
        return Lineage(segments, np.array(numbers)[segments], positions)

    def positions(self) -> Tensor:
        """Position of each token in its own path, int64 `[N]`."""
        return torch.from_numpy(self.lineage().position)

    def dense_mask(self, device: torch.device) -> Tensor:
        """Which query sees which key, bool `[N, N]`: the definition that every fast path is tested against."""
        segment, prompt, position = to_device(device, *self.lineage().tensors())
        seen = ((segment[:, None] == segment) | (prompt[:, None] == segment)) & (position[:, None] >= position)
        return seen if self.window is None else seen & (position[:, None] - position < self.window)

    def alone(self, tree: Tree) -> TreeLayout:
        """The layout of one of the trees as if nothing else were in the stream."""
        return TreeLayout((replace(tree, start=0),), tree.end - tree.start, self.window)


def block_lists(tokens: Lineage, window: int | None) -> list[Tensor]:
    """Which blocks of `BLOCK` keys each block of queries sees in part, and which it sees whole, as FlexAttention's
    `BlockMask` has them: `kv_num_blocks [1, 1, Q]` and `kv_indices [1, 1, Q, L]`, int32, for either.

    From the runs of tokens of one segment and consecutive positions, of which there are few.
    """
    missing = -len(tokens.segment) % BLOCK  # the last block is filled up by places of the segment −1
    segment, prompt, position = (np.pad(part, (0, missing), constant_values=-1) for part in tokens)
    ends = np.diff(segment, append=-2) != 0
    ends[BLOCK - 1 :: BLOCK] = True
    (ends,) = ends.nonzero()
    begins = np.concatenate([[0], ends[:-1] + 1])
    (blocks,) = (begins % BLOCK == 0).nonzero()
    segment, prompt, first, last = segment[ends], prompt[ends], position[begins], position[ends]
    far = np.iinfo(np.int32).max if window is None else window
    related = (segment[:, None] == segment) | (prompt[:, None] == segment)
    part = related & (last[:, None] >= first) & (first[:, None] - last < far)
    whole = related & (first[:, None] >= last) & (last[:, None] - first < far)
    part = np.logical_or.reduceat(np.logical_or.reduceat(part, blocks, axis=0), blocks, axis=1)
    whole = np.logical_and.reduceat(np.logical_and.reduceat(whole, blocks, axis=0), blocks, axis=1)
    lists = []
    for chosen in (part & ~whole, whole):
        lists += [chosen.sum(axis=1), np.argsort(~chosen, axis=1, kind="stable")]
    return [torch.from_numpy(found.astype(np.int32))[None, None] for found in lists]


@dataclass(frozen=True, eq=False)
class TreeStream:
    """One row of tokens: `input_ids` and `position_ids` int64 `[1, N]`, and their layout."""

    input_ids: Tensor
    position_ids: Tensor
    layout: TreeLayout


class Predictions(NamedTuple):
    """Which hidden states of a `policy_stream`, or of `padded_rows` laid flat, predict which completion tokens.

    `positions` `[R]`: the predicting positions; of a stream, of each tree the last prompt token and the leaves. Of `T`
    completion tokens: `rows` `[T]` the number of the predicting position, not decreasing, and the same on the CPU;
    `targets` `[T]` the token's id; `places` `[T]` where in `[B, K]`, laid flat, its completion stands, and `cells`
    `[T]` where in `[B, K, L]` it stands itself, L the longest completion. In a stream the K first tokens of a group
    share one position, and so one row of the vocabulary.
    """

    positions: Tensor
    rows: Tensor
    targets: Tensor
    places: Tensor
    cells: Tensor
    host_rows: Tensor


def policy_stream(
    groups: Sequence[Group],
    target: torch.device,
    *,
    places: Tensor | None = None,
    windows: Sequence[int | None] = (None,),
) -> tuple[TreeStream, Predictions]:
    """The stream whose leaves are the completions without their last token, which is only ever a target.

    `places` says where in `[B, K]`, laid flat, the completions of `groups` stand (see `places_of`); `windows` are those
    of the model's layers.
    """
    tokens, layout = _stream(groups, unread=1)
    known = _predictions(groups, layout, places_of(groups) if places is None else places)
    stream, found = _on_device(tokens, layout, target, windows, known)
    return stream, Predictions._make([*found, known[1]])


def whole_stream(
    groups: Sequence[Group],
    target: torch.device,
    *,
    places: Tensor | None = None,
    windows: Sequence[int | None] = (None,),
) -> tuple[TreeStream, Tensor, Tensor]:
    """The stream whose leaves are whole completions; the positions `[S]` of their last tokens, and their `places`."""
    tokens, layout = _stream(groups, unread=0)
    ends = torch.tensor([end - 1 for tree in layout.trees for _, end in tree.leaf_spans])
    known = (ends, places_of(groups) if places is None else places)
    stream, (last, there) = _on_device(tokens, layout, target, windows, known)
    return stream, last, there


def _stream(groups: Sequence[Group], *, unread: int) -> tuple[Tensor, TreeLayout]:
    leaves = [[ids[: len(ids) - unread] for ids in group.completion_ids] for group in groups]
    trees, start = [], 0
    for group, parts in zip(groups, leaves, strict=True):
        trees.append(Tree(start, len(group.prompt_ids), tuple(len(part) for part in parts)))
        start = trees[-1].end
    tokens = [part for group, parts in zip(groups, leaves, strict=True) for part in (group.prompt_ids, *parts)]
    return torch.cat(tokens), TreeLayout(tuple(trees), start, unread=unread)


def _on_device(
    tokens: Tensor, layout: TreeLayout, target: torch.device, windows: Sequence[int | None], known: Sequence[Tensor]
) -> tuple[TreeStream, list[Tensor]]:
    """The stream and what else is `known` of it, in one copy; with the masks, where the device works with them."""
    masks = {} if target.type == "cpu" else {w: mask_parts(layout.with_window(w)) for w in {None, *windows}}
    flat = [tokens[None], layout.positions()[None], *known, *(part for parts in masks.values() for part in parts)]
    input_ids, position_ids, *found = to_device(target, *flat)
    rest = iter(found[len(known) :])
    for window, parts in masks.items():
        layout.masks[layout.with_window(window).window] = [next(rest) for _ in parts]
    return TreeStream(input_ids, position_ids, layout), found[: len(known)]


def mask_parts(layout: TreeLayout) -> list[Tensor]:
    """What a device needs to attend by this layout: the lineage of its tokens, and its `block_lists`."""
    tokens = layout.lineage()
    return [*tokens.tensors(), *block_lists(tokens, layout.window)]


def _predictions(groups: Sequence[Group], layout: TreeLayout, places: Tensor) -> list[Tensor]:
    """`positions`, `rows`, `targets`, `places` and `cells` of `Predictions`."""
    positions, rows, targets, sequences, numbers = [], [], [], [], []
    row = sequence = 0
    for group, tree in zip(groups, layout.trees, strict=True):
        first, count = tree.start + tree.prompt_length - 1, group.num_completions
        positions.append(torch.arange(first, tree.end))
        rows += [torch.full((count,), row), torch.arange(row + 1, row + tree.end - first)]
        targets += [ids[:1] for ids in group.completion_ids] + [ids[1:] for ids in group.completion_ids]
        members = torch.arange(sequence, sequence + count)
        sequences += [members, torch.repeat_interleave(members, torch.tensor(tree.leaf_lengths))]
        numbers += [torch.zeros(count, dtype=torch.long), *(torch.arange(1, n + 1) for n in tree.leaf_lengths)]
        row += tree.end - first
        sequence += count
    where = places[torch.cat(sequences)]
    cells = where * _longest_completion(groups) + torch.cat(numbers)
    return [torch.cat(positions), torch.cat(rows), torch.cat(targets), where, cells]


def places_of(groups: Sequence[Group]) -> Tensor:
    """Where in `[B, K]`, laid flat, each completion stands, counted through the groups: int64 `[S]`."""
    width = _most_completions(groups)
    return torch.tensor([i * width + k for i, group in enumerate(groups) for k in range(group.num_completions)])


def padded_rows(groups: Sequence[Group], target: torch.device) -> tuple[Tensor, Tensor, Predictions]:
    """The slower way: a row `prompt + completion` for each completion, padded on the right.

    `input_ids` and `attention_mask` `[S, L]`, and the predictions of the rows laid flat, a completion after the other.
    """
    rows = [torch.cat([group.prompt_ids, ids]) for group in groups for ids in group.completion_ids]
    lengths = torch.tensor([len(row) for row in rows])
    prompts = torch.tensor([len(group.prompt_ids) for group in groups for _ in group.completion_ids])
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    index = torch.arange(input_ids.shape[1])
    there = index < lengths[:, None]
    row, token = (there & (index >= prompts[:, None])).nonzero(as_tuple=True)
    places, order = places_of(groups)[row], torch.arange(len(row))
    cells = places * _longest_completion(groups) + token - prompts[row]
    positions = row * input_ids.shape[1] + token - 1
    known = (positions, order, input_ids[row, token], places, cells)
    input_ids, mask, *found = to_device(target, input_ids, there.long(), *known)
    return input_ids, mask, Predictions._make([*found, order])


def unflatten(values: Tensor, groups: Sequence[Group], places: Tensor | None = None) -> Tensor:
    """Values `[S, …]` → `[B, K, …]`, those of one place added up, 0 where a group has no i-th completion.

    `places` `[S]` on the device of the values; without them there is one value per completion, in order.
    """
    if places is None:
        (places,) = to_device(values.device, places_of(groups))
    shape = len(groups), _most_completions(groups)
    return values.new_zeros(math.prod(shape), *values.shape[1:]).index_add(0, places, values).unflatten(0, shape)


def unflatten_tokens(values: Tensor, cells: Tensor, groups: Sequence[Group]) -> Tensor:
    """One value per completion token → `[B, K, L]`, 0 where no token is; `cells` as `Predictions` has them."""
    shape = len(groups), _most_completions(groups), _longest_completion(groups)
    return values.new_zeros(math.prod(shape)).index_copy(0, cells, values).view(shape)


def _most_completions(groups: Sequence[Group]) -> int:
    return max(group.num_completions for group in groups)


def _longest_completion(groups: Sequence[Group]) -> int:
    return max(len(ids) for group in groups for ids in group.completion_ids)
