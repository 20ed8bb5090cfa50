"""Sizes left to choose: constants on a CPU, and on an accelerator what fits by the numbers of the architecture."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from exalign.models.lm_head import head_bytes
from exalign.models.model_settings import LoraSettings, ModelSettings
from exalign.models.sizes import Architecture, completions_at_once, tokens_to_read, training_sizes
from exalign.run.plan import PUBLIC_CONFIGURATIONS, architecture_of

GIB = 2**30
SMALL, LARGE = ({"config": PUBLIC_CONFIGURATIONS[name]} for name in ("gpt2", "Qwen/Qwen2.5-7B-Instruct"))


def model_of(values: dict, lora: bool = False) -> Architecture:
    settings = ModelSettings(**values, lora=LoraSettings() if lora else None, dtype="bfloat16" if lora else "float32")
    return architecture_of(settings, "policy", None)


def trained(model: Architecture, gib: float | None, budget="auto", again="auto", shards: int = 1) -> tuple[int, bool]:
    memory = None if gib is None else gib * GIB
    return training_sizes([model], memory, token_budget=budget, checkpointing=again, autocast=True, shards=shards)


def test_on_a_cpu_they_are_constants() -> None:
    assert trained(model_of(SMALL), None) == (2048, False)
    assert trained(model_of(SMALL), None, budget=512, again=True) == (512, True)
    assert [tokens_to_read([], None, wanted) for wanted in ("auto", None, 7)] == [2048, 8192, 7]
    assert [completions_at_once([], None, n, prompt_tokens=9, tokens=9) for n in ("auto", 5)] == [64, 5]


@pytest.mark.parametrize(("values", "gib", "lora"), [(SMALL, 8, False), (SMALL, 80, False), (LARGE, 80, True)])
def test_what_is_chosen_fits_and_more_would_not(values, gib, lora) -> None:
    model = model_of(values, lora)
    tokens, again = trained(model, gib)
    state = 2 * model.weight_bytes + 3 * model.trained_bytes + model.half_copies
    each = model.training_activations(autocast=True, checkpointed=again)
    needed = state + model.head_activations(32768, gib * GIB) + tokens * each
    assert tokens in range(1024, 32768 + 1, 1024)
    assert needed <= 0.9 * gib * GIB
    assert tokens == 32768 or needed + 1024 * each > 0.9 * gib * GIB


def test_activations_are_recomputed_where_the_budget_would_not_fit_without() -> None:
    model = model_of(SMALL)
    assert [trained(model, gib)[1] for gib in (4, 80)] == [True, False]
    assert [trained(model, 80, budget=n) for n in (4096, 10**6)] == [(4096, False), (10**6, True)]
    assert trained(model, 4, again=False)[1] is False
    assert trained(model_of(LARGE), 80, shards=8)[0] > trained(model_of(LARGE), 80)[0] == 1024


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_layers_with_numbers_of_their_own_have_the_largest(kind) -> None:
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    model = Architecture(kind, module, "")
    widths = [m.out_features for name, m in module.named_modules() if name.endswith("mlp.up_proj")]
    keys = [m.out_features for name, m in module.named_modules() if name.endswith("self_attn.k_proj")]
    assert model.feed_forward == max(widths)
    assert model.head_size * model.key_heads >= max(keys)
    assert trained(model, 80)[0] >= 1024


def test_a_model_without_blocks_has_sizes_too() -> None:
    model = model_of({"config": PUBLIC_CONFIGURATIONS["gpt2"] | {"n_layer": 0}})
    assert model.layer_bytes == 0 and trained(model, 80)[0] == 32768


def test_more_memory_never_means_less() -> None:
    model = model_of(SMALL)
    for sizes in (
        [trained(model, gib, again=True)[0] for gib in range(1, 100, 7)],
        [tokens_to_read([model], gib * GIB, None) for gib in range(1, 100, 7)],
        [completions_at_once([model], gib * GIB, "auto", prompt_tokens=64, tokens=64) for gib in range(1, 100, 7)],
    ):
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1]


def test_the_head_keeps_more_where_there_is_more() -> None:
    assert head_bytes(None) == head_bytes(1 * GIB) == (160 * 2**20, 30 * 2**20)
    assert head_bytes(80 * GIB) == (5 * GIB, 5 * GIB // 8)
    assert torch.float32.itemsize * 128256 * 64 < head_bytes(80 * GIB)[1]
