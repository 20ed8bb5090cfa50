"""Tree attention against the dense definition, and the definition against rows computed alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exalign.data.batching import Group
from exalign.models.attention import dense_tree_attention, merged_tree_attention, repeat_heads
from exalign.models.prefix_tree import TreeLayout, policy_stream, whole_stream

SHAPES = [
    [(1, [1])],
    [(1, [1, 1, 1])],
    [(5, [3])],
    [(4, [3, 1, 6]), (1, [2, 2]), (7, [1])],
    [(40, [17, 5, 33, 1, 8, 2, 9, 4, 3, 21, 1, 1, 6, 7, 2, 5])],
]


def groups_of(shape: list[tuple[int, list[int]]], vocab: int = 47) -> list[Group]:
    return [
        Group(index, torch.randint(vocab, (prompt,)), tuple(torch.randint(vocab, (length,)) for length in lengths))
        for index, (prompt, lengths) in enumerate(shape)
    ]


def layout_of(shape: list[tuple[int, list[int]]]) -> TreeLayout:
    return policy_stream(groups_of(shape), torch.device("cpu"))[0].layout


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_dense_mask_shows_each_path_exactly_itself(shape, window) -> None:
    stream = whole_stream(groups_of(shape), torch.device("cpu"))[0]
    layout = stream.layout.with_window(window)
    mask, positions = layout.dense_mask(torch.device("cpu")), layout.positions()
    for tree in layout.trees:
        for begin, end in tree.leaf_spans:
            path = [*range(tree.start, tree.start + tree.prompt_length), *range(begin, end)]
            for query in range(begin, end):
                seen = [token for token in path if token <= query]
                kept = seen if window is None else seen[-window:]
                assert mask[query].nonzero().flatten().tolist() == kept
            assert positions[path].tolist() == list(range(len(path)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_merged_flash_equals_the_dense_definition_forward_and_backward(shape, dtype, tolerance) -> None:
    layout = layout_of(shape)
    states = torch.randn(3, 1, 6, layout.num_tokens, 8, dtype=torch.float64)
    weight = torch.randn(1, layout.num_tokens, 6, 8, dtype=torch.float64)

    def run(attend, dtype) -> tuple[Tensor, Tensor]:
        leaves = states.to(dtype).requires_grad_()
        out = attend(*leaves, layout, scale=0.7)
        (grad,) = torch.autograd.grad((out.double() * weight).sum(), leaves)
        return out.double(), grad.double()

    for fast, slow in zip(run(merged_tree_attention, dtype), run(dense_tree_attention, torch.float64), strict=True):
        assert (fast - slow).abs().max() <= tolerance * max(1.0, slow.abs().max().item())


def test_scores_of_very_different_size_merge_without_overflow() -> None:
    layout = layout_of([(6, [3, 4, 5])])
    query, key, value = (torch.randn(1, 2, layout.num_tokens, 4, dtype=torch.float64) * 200 for _ in range(3))
    fast = merged_tree_attention(query, key, value, layout, scale=1.0)
    assert torch.allclose(fast, dense_tree_attention(query, key, value, layout, scale=1.0))


def test_repeated_heads_stand_beside_their_source() -> None:
    states = torch.arange(2.0).view(1, 2, 1, 1)
    assert repeat_heads(states, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_predictions_name_each_completion_token_once_with_the_position_before_it(shape) -> None:
    groups = groups_of(shape)
    stream, found = policy_stream(groups, torch.device("cpu"))
    assert (found.rows.diff() >= 0).all()
    predicting = found.positions[found.rows]
    width, longest = max(g.num_completions for g in groups), max(len(y) for g in groups for y in g.completion_ids)
    seen = 0
    for index, (group, tree) in enumerate(zip(groups, stream.layout.trees, strict=True)):
        for k, (ids, (begin, end)) in enumerate(zip(group.completion_ids, tree.leaf_spans, strict=True)):
            of_this = found.places == index * width + k
            order = found.cells[of_this].argsort()
            assert torch.equal(found.targets[of_this][order], ids)
            first = (index * width + k) * longest
            assert found.cells[of_this][order].tolist() == list(range(first, first + len(ids)))
            assert predicting[of_this][order].tolist() == [tree.start + tree.prompt_length - 1, *range(begin, end)]
            seen += len(ids)
    assert seen == len(found.targets)
