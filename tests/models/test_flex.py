"""FlexAttention, the way of an accelerator, against the dense twin on the CPU: uncompiled, compiled, and its blocks."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import create_block_mask

from exalign.data.batching import Group
from exalign.models import attention
from exalign.models.attention import dense_tree_attention, flex_tree_attention, repeat_heads
from exalign.models.prefix_tree import TreeLayout, policy_stream

RAGGED = [
    [(1, [1])],
    [(127, [1])],
    [(128, [2, 129])],
    [(350, [40, 30, 41, 20])],
    [(40, [17, 5, 33, 1, 8, 2, 9, 4, 3, 21, 1, 1, 6, 7, 2, 5])],
    [(40, [17, 5, 33, 1]), (100, [20, 30]), (3, [200]), (260, [2, 2, 2, 2])],
]
HEADS = [(4, 4, 64), (4, 2, 64), (8, 1, 16), (2, 2, 128), (2, 1, 256), (6, 2, 32)]


def layout_of(shape: list[tuple[int, list[int]]], window: int | None = None) -> TreeLayout:
    groups = [
        Group(i, torch.zeros(prompt, dtype=torch.long), tuple(torch.zeros(n, dtype=torch.long) for n in lengths))
        for i, (prompt, lengths) in enumerate(shape)
    ]
    return policy_stream(groups, torch.device("cpu"))[0].layout.with_window(window)


def random_shape(draw: random.Random) -> list[tuple[int, list[int]]]:
    return [
        (draw.randint(1, 200), [draw.randint(1, 60) for _ in range(draw.randint(1, 16))])
        for _ in range(draw.randint(1, 5))
    ]


def states_of(layout: TreeLayout, heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    queries, keys, width = heads
    return [torch.randn(1, n, layout.num_tokens, width, dtype=torch.float64).to(dtype) for n in (queries, keys, keys)]


def difference(layout: TreeLayout, states: list[Tensor], softcap: float | None, *, backward: bool = False) -> float:
    """Of the outputs, or of the gradients, from those of the dense twin in float64: over its largest number, or 1."""
    weight = torch.randn(1, layout.num_tokens, states[0].shape[1], states[0].shape[3], dtype=torch.float64)

    def run(attend, given: list[Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            given = [part.detach().requires_grad_(backward) for part in given]
            out = attend(*given, layout, scale=0.2, softcap=softcap)
            return list(torch.autograd.grad((out.double() * weight).sum(), given)) if backward else [out]

    def dense(query, key, value, layout, **how) -> Tensor:
        return dense_tree_attention(query, *(repeat_heads(x, query.shape[1]) for x in (key, value)), layout, **how)

    pairs = zip(run(flex_tree_attention, states), run(dense, [part.double() for part in states]), strict=True)
    return max(float((fast.double() - slow).abs().max() / slow.abs().max().clamp(min=1.0)) for fast, slow in pairs)


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    """Torch's own rule for it, on any device: it has no compiled backward pass for a CPU, and asks not to be asked."""
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torchs, "_validate_device", lambda *states: None)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: torchs.flex_attention)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 30])
@pytest.mark.parametrize("shape", RAGGED)
def test_it_is_the_dense_twin(shape, window, softcap, backward) -> None:
    layout = layout_of(shape, window)
    assert difference(layout, states_of(layout, (4, 2, 16), torch.float64), softcap, backward=backward) < 1e-12


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_of_any_size_and_number(heads, dtype, tolerance, backward) -> None:
    layout = layout_of(RAGGED[5])
    assert difference(layout, states_of(layout, heads, dtype), None, backward=backward) < tolerance


@pytest.mark.parametrize("window", [None, 1, 30, 129])
@pytest.mark.parametrize("seed", range(5))
def test_the_blocks_are_those_of_the_whole_mask(seed, window) -> None:
    """Built from the segments alone they are what torch finds by looking at every pair, in the same order."""
    layout = layout_of(random_shape(random.Random(seed)), window)
    with torch.no_grad():
        found = attention.block_mask(attention.mask_parts(layout), layout.window)
    n = layout.num_tokens
    index, zero = torch.arange(n), torch.tensor(0)
    assert torch.equal(found.mask_mod(zero, zero, index[:, None], index[None]), layout.dense_mask(torch.device("cpu")))
    expected = create_block_mask(found.mask_mod, None, None, n, n, "cpu")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def compiles() -> bool:
    try:
        return bool(get_cpp_compiler())
    except Exception:  # torch raises one of its own where there is none
        return False


@pytest.mark.large
@pytest.mark.skipif(not compiles(), reason="there is no C++ compiler for torch.compile")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (30, 5.0)])
def test_compiled_it_is_the_dense_twin_and_fifty_micro_batches_compile_it_three_times_at_most(window, softcap) -> None:
    torch._dynamo.reset()
    attention._compiled_flex.cache_clear()
    before, draw = counters["stats"]["unique_graphs"], random.Random(0)
    for _ in range(50):
        layout = layout_of(random_shape(draw), window)
        assert difference(layout, states_of(layout, (4, 2, 64), torch.float32), softcap) < 1e-5
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 3


@pytest.mark.large
@pytest.mark.skipif(not compiles(), reason="there is no C++ compiler for torch.compile")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("heads", HEADS)
def test_compiled_for_heads_of_any_size_and_number(heads, dtype, tolerance) -> None:
    torch._dynamo.reset()
    attention._compiled_flex.cache_clear()
    layout = layout_of(RAGGED[5])
    assert difference(layout, states_of(layout, heads, dtype), None) < tolerance
