"""Streams of trees: a prompt computed once for its K completions, a whole list of groups in one row, no padding.

A tree is `[prompt | leaf_1 | … | leaf_K]`. The prompt attends to itself causally; each leaf attends to the whole prompt
and causally to itself; the positions of every leaf restart at the prompt's length. So each path prompt + leaf computes
what it would compute alone in a row. The slower way, a padded row for each completion, stands below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from exalign.data.batching import Group


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


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """What attention must know of a stream of `num_tokens` tokens; it travels in the place of the attention mask.

    `window` limits how far back a token sees along its own path: itself and the `window − 1` tokens before it. Each
    leaf is `unread` tokens shorter than its completion.
    """

    trees: tuple[Tree, ...]
    num_tokens: int
    window: int | None = None
    unread: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return max(tree.longest for tree in self.trees)

    def with_window(self, window: int | None) -> TreeLayout:
        """This layout seen by a layer with a sliding window; a window that no path exceeds is no window."""
        unchanged = window is None or window >= self.longest or window == self.window
        return self if unchanged else replace(self, window=window)

    def positions(self) -> Tensor:
        """Position of each token in its own path, int64 `[N]`."""
        parts = []
        for tree in self.trees:
            parts.append(torch.arange(tree.prompt_length))
            parts += [torch.arange(tree.prompt_length, tree.prompt_length + length) for length in tree.leaf_lengths]
        return torch.cat(parts)

    def tree_ids(self) -> Tensor:
        """Number of the tree of each token, int64 `[N]`."""
        sizes = torch.tensor([tree.end - tree.start for tree in self.trees])
        return torch.repeat_interleave(torch.arange(len(self.trees)), sizes)

    def leaf_ids(self) -> Tensor:
        """0 for a prompt token, i for a token of the tree's i-th leaf (from 1), int64 `[N]`."""
        sizes = [length for tree in self.trees for length in (tree.prompt_length, *tree.leaf_lengths)]
        numbers = [i for tree in self.trees for i in range(len(tree.leaf_lengths) + 1)]
        return torch.repeat_interleave(torch.tensor(numbers), torch.tensor(sizes))

    def dense_mask(self, device: torch.device) -> Tensor:
        """Which query sees which key, bool `[N, N]`: the definition that every fast path is tested against."""
        tree, leaf, position = (ids.to(device) for ids in (self.tree_ids(), self.leaf_ids(), self.positions()))
        index = torch.arange(self.num_tokens, device=device)
        seen = (tree[:, None] == tree) & (index[:, None] >= index) & ((leaf == 0) | (leaf[:, None] == leaf))
        return seen if self.window is None else seen & (position[:, None] - position < self.window)

    def alone(self, tree: Tree) -> TreeLayout:
        """The layout of one of the trees as if nothing else were in the stream."""
        return TreeLayout((replace(tree, start=0),), tree.end - tree.start, self.window)


@dataclass(frozen=True, eq=False)
class TreeStream:
    """One row of tokens: `input_ids` and `position_ids` int64 `[1, N]`, and their layout."""

    input_ids: Tensor
    position_ids: Tensor
    layout: TreeLayout


@dataclass(frozen=True, eq=False)
class Predictions:
    """Which hidden states predict which completion tokens.

    `spans`: begin and end in the stream of the `R` predicting positions, one span per tree (the last prompt token and
    the leaves, which is all that follows it). Of `T` completion tokens: `rows` `[T]` the predicting position, counted
    through the spans and not decreasing; `targets` `[T]` the token's id; `sequences` `[T]` the completion it belongs
    to, counted through the groups. The K first tokens of a group share one position, and so one row of the vocabulary.
    """

    spans: tuple[tuple[int, int], ...]
    rows: Tensor
    targets: Tensor
    sequences: Tensor
    num_sequences: int


def policy_stream(groups: Sequence[Group], device: torch.device) -> TreeStream:
    """The stream whose leaves are the completions without their last token, which is only ever a target."""
    return _stream(groups, 1, device)


def whole_stream(groups: Sequence[Group], device: torch.device) -> TreeStream:
    """The stream whose leaves are whole completions, for a head that reads their last token."""
    return _stream(groups, 0, device)


def _stream(groups: Sequence[Group], unread: int, device: torch.device) -> TreeStream:
    leaves = [[ids[: len(ids) - unread] for ids in group.completion_ids] for group in groups]
    trees, start = [], 0
    for group, parts in zip(groups, leaves, strict=True):
        trees.append(Tree(start, len(group.prompt_ids), tuple(len(part) for part in parts)))
        start = trees[-1].end
    layout = TreeLayout(tuple(trees), start, unread=unread)
    tokens = [part for group, parts in zip(groups, leaves, strict=True) for part in (group.prompt_ids, *parts)]
    return TreeStream(torch.cat(tokens)[None].to(device), layout.positions()[None].to(device), layout)


def predictions(groups: Sequence[Group], layout: TreeLayout, device: torch.device) -> Predictions:
    """The completion tokens of `groups` and the positions of `policy_stream(groups)` that predict them."""
    spans, rows, targets, sequences = [], [], [], []
    row = sequence = 0
    for group, tree in zip(groups, layout.trees, strict=True):
        spans.append((tree.start + tree.prompt_length - 1, tree.end))
        count, lengths = group.num_completions, torch.tensor(tree.leaf_lengths)
        rows += [torch.full((count,), row), torch.arange(row + 1, row + 1 + int(lengths.sum()))]
        targets += [ids[:1] for ids in group.completion_ids] + [ids[1:] for ids in group.completion_ids]
        numbers = torch.arange(sequence, sequence + count)
        sequences += [numbers, torch.repeat_interleave(numbers, lengths)]
        row += spans[-1][1] - spans[-1][0]
        sequence += count
    return Predictions(
        tuple(spans),
        torch.cat(rows).to(device),
        torch.cat(targets).to(device),
        torch.cat(sequences).to(device),
        sequence,
    )


def padded_rows(groups: Sequence[Group], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One row `prompt + completion` per completion, padded on the right: ids, mask `[N, L]`; prompt lengths `[N]`."""
    rows = [torch.cat([group.prompt_ids, ids]) for group in groups for ids in group.completion_ids]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    prompts = torch.tensor([len(group.prompt_ids) for group in groups for _ in group.completion_ids], device=device)
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    attention_mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
    return input_ids, attention_mask, prompts


def predicted_tokens(attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Which of the positions 1 … L − 1 of padded rows hold completion tokens, bool `[N, L − 1]`."""
    positions = torch.arange(1, attention_mask.shape[1], device=attention_mask.device)
    return (positions >= prompt_lengths[:, None]) & attention_mask[:, 1:].bool()


def unflatten(values: Tensor, groups: Sequence[Group]) -> Tensor:
    """One row of `values [N, …]` per completion, in order → `[B, K, …]`, 0 where a group has no i-th completion."""
    width = max(group.num_completions for group in groups)
    rows = [index * width + i for index, group in enumerate(groups) for i in range(group.num_completions)]
    flat = values.new_zeros(len(groups) * width, *values.shape[1:])
    flat = flat.index_copy(0, torch.tensor(rows, device=values.device), values)
    return flat.unflatten(0, (len(groups), width))


def unflatten_tokens(values: Tensor, sequences: Tensor, groups: Sequence[Group]) -> Tensor:
    """One value per completion token → `[B, K, T]`, padded with 0 on the right; T is the longest completion.

    `values` `[N]`; `sequences` `[N]` the completion that a token belongs to, counted through the groups; the tokens of
    one completion come in their order, whatever stands between them.
    """
    lengths = [len(ids) for group in groups for ids in group.completion_ids]
    rows = values[sequences.argsort(stable=True)].split(lengths)
    return unflatten(nn.utils.rnn.pad_sequence(rows, batch_first=True), groups)
