"""The count of necessary work, against the profiler's count of what plain transformers do."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from exalign.data.batching import Group
from exalign.models.flops import forward_flops, matmul_peak, necessary_positions, training_flops


def model_of(model_type: str, **more: int) -> torch.nn.Module:
    names = {"gpt2": ("n_embd", "n_layer", "n_head"), "llama": ("hidden_size", "num_hidden_layers")}
    sizes = dict(zip(names[model_type], (16, 3, 4), strict=False)) | more
    config = AutoConfig.for_model(model_type, vocab_size=50, attn_implementation="eager", **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "model",
    [
        model_of("gpt2"),
        model_of("llama", num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, head_dim=8),
    ],
    ids=["gpt2", "llama"],
)
def test_one_token_completions_of_one_token_prompts_are_plain_rows(model: torch.nn.Module) -> None:
    """With P = 1 and T = 1 nothing is shared, padded or masked, so the count is the one of the model's own forward."""
    groups = [Group(i, torch.tensor([i]), (torch.tensor([i + 1]),)) for i in range(5)]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(5)[:, None], use_cache=False)
    assert forward_flops(model, groups) == pytest.approx(counter.get_total_flops())


def test_pairs_are_the_ones_of_the_dense_mask() -> None:
    from exalign.models.prefix_tree import policy_stream

    ids = torch.arange(40)
    groups = [Group(0, ids[:7], (ids[:4], ids[:1], ids[:6])), Group(1, ids[:1], (ids[:3],))]
    layout = policy_stream(groups, torch.device("cpu"))[0].layout
    positions = necessary_positions(groups)
    assert positions.tokens == layout.num_tokens
    assert positions.pairs == int(layout.dense_mask(torch.device("cpu")).sum())
    assert positions.rows == sum(tree.end - tree.start - tree.prompt_length + 1 for tree in layout.trees)


def test_training_is_three_forwards_and_less_where_weights_are_frozen() -> None:
    model, ids = model_of("gpt2"), torch.arange(20)
    groups = [Group(0, ids[:9], (ids[:4], ids[:2]))]
    assert training_flops(model, groups) == 3 * forward_flops(model, groups)
    weight = model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    saved = 2 * necessary_positions(groups).tokens * weight.numel()
    assert training_flops(model, groups) == 3 * forward_flops(model, groups) - saved


def test_the_peak_is_a_rate() -> None:
    model = model_of("gpt2")
    assert 1e3 < matmul_peak(model, repeats=1) < 1e16
    assert 1e3 < matmul_peak(model, dtype=torch.bfloat16, repeats=1) < 1e17
