"""The pretend accelerator notices what a GPU would: each mutant leaves one tensor on the CPU."""

from __future__ import annotations

import pytest

from device.pretend import apart
from device.work import mutated

MUTANTS = [
    ("data.batching", "values_of", "to_device(target, *found.values(), *more)", "[*found.values(), *more]"),
    ("models.prefix_tree", "_on_device", "to_device(target, *flat)", "[flat[0].to(target), *flat[1:]]"),
    ("models.prefix_tree", "_on_device", "to_device(target, *flat)", "[*(t.to(target) for t in flat[:2]), *flat[2:]]"),
    ("models.prefix_tree", "padded_rows", "to_device(target, ", "("),
    ("models.lm_head", "token_logprobs", "rows, targets, logit_map, how", "host_rows, targets, logit_map, how"),
    ("methods.sft", "MaximumLikelihood.loss", "stack_weights(groups).to(logp)", "stack_weights(groups)"),
    ("rollout.sampler", "draw_tokens", "to_device(logits.device, uniforms, every_row)", "uniforms, every_row"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[1]}: {mutant[3]}")
def test_a_tensor_that_stayed_behind_is_noticed(mutant, workers) -> None:
    assert "CPU" in apart(workers, mutated, *mutant)
