"""Counts, bytes and operations of a plan, against real small models, real tensors and the counts used for speed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from exalign.data.batching import Group
from exalign.methods.matching import Matching
from exalign.models.flops import forward_flops, training_flops
from exalign.models.loading import _quicken_gelu, with_lora
from exalign.models.logprobs import PackedPolicy
from exalign.models.model_settings import LoraSettings, ModelSettings
from exalign.models.sizes import Architecture
from exalign.rollout.sampler import Branches, SharedDecoder
from exalign.rollout.settings import SampleSettings
from exalign.run.plan import (
    PUBLIC_CONFIGURATIONS,
    Assumptions,
    Load,
    architecture_of,
    cache_tokens,
    draw,
    find_machine,
    in_turn,
    read,
    train,
)
from exalign.training.optimizer import adamw, set_learning_rate

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4},
    "gpt_neox": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 192,
    },
}
LOAD = Load(6, 4, 40, 23, 48, 32)


def tiny(model_type: str, lora: LoraSettings | None = None, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    values = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1, **TINY[model_type], **more}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    _quicken_gelu(model)
    return with_lora(model, lora, task="CAUSAL_LM")


def groups_of(load: Load) -> list[Group]:
    ids = torch.arange(50) % 50
    completions = (ids[: load.completion_tokens],) * load.completions
    return [Group(index, ids[: load.prompt_tokens], completions) for index in range(load.prompts)]


MACHINE = find_machine("H100", 1, Assumptions())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-large", 774_030_080),
        ("EleutherAI/pythia-2.8b", 2_775_208_960),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
    ],
)
def test_built_in_configurations_have_the_published_number_of_parameters(name: str, published: int) -> None:
    model = architecture_of(ModelSettings(source=name), "policy", None)
    assert model.parameters == model.trained == published
    assert model.weight_bytes == 4 * published
    assert set(PUBLIC_CONFIGURATIONS) >= {name}


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=3), LoraSettings(rank=3, dora=True)])
@pytest.mark.parametrize("model_type", TINY)
def test_counts_without_weights_are_those_of_the_real_model(model_type: str, lora: LoraSettings | None) -> None:
    config = {"model_type": model_type, "vocab_size": 50, **TINY[model_type]}
    planned, real = architecture_of(ModelSettings(config=config, lora=lora), "policy", None), tiny(model_type, lora)
    assert planned.parameters == sum(p.numel() for p in real.parameters())
    assert planned.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert forward_flops(planned.module, groups_of(LOAD)) == forward_flops(real, groups_of(LOAD))


def test_an_adapter_is_planned_as_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    assert architecture_of(ModelSettings(source=str(tmp_path)), "policy", None).parameters == 124_439_808


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=3)])
def test_operations_are_the_necessary_work_of_all_groups(lora: LoraSettings | None) -> None:
    real, groups = tiny("qwen2", lora), groups_of(LOAD)
    model = Architecture("tiny", real, "")
    trained = train([model], Matching(), LOAD, MACHINE, passes=3)
    assert trained.flops == 3 * training_flops(real, groups)
    drawn = draw(model, LOAD, SampleSettings(), MACHINE)
    assert read(model, LOAD, MACHINE, 64).flops == drawn.flops == forward_flops(real, groups)
    assert in_turn([trained, drawn], 2).flops == 2 * (trained.flops + drawn.flops)


def test_an_encoder_reads_the_prompt_again_for_every_completion() -> None:
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = architecture_of(ModelSettings(config=config), "classifier", 50)
    cost = read(encoder, LOAD, MACHINE, 64)
    assert not encoder.shares_prompts
    assert cost.tokens == LOAD.prompts * LOAD.completions * (LOAD.prompt_tokens + LOAD.completion_tokens)


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=3)])
def test_weights_gradients_and_moments_are_those_of_a_real_step(lora: LoraSettings | None) -> None:
    model = tiny("gpt_neox", lora)
    policy = PackedPolicy(model)
    optimizer = adamw(policy, betas=(0.9, 0.95), weight_decay=0.0, device=torch.device("cpu"))
    set_learning_rate(optimizer, 1e-3)
    policy(groups_of(LOAD), temperature=1.0).sum().backward()
    optimizer.step()
    planned = train([Architecture("tiny", model, "")], Matching(), LOAD, MACHINE, passes=1).replicated
    assert planned.weights == bytes_of(model.parameters())
    assert planned.gradients == bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    # Beside its two moments AdamW keeps a count of four bytes for each tensor.
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert planned.optimizer == bytes_of(moments)


def saved(model: nn.Module, precision: str) -> Iterator[torch.Tensor]:
    """What autograd keeps of one forward pass of the policy, each storage once, weights left out."""
    storages: dict[int, torch.Tensor] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        # Kept until the end, so that no storage is used twice.
        result = PackedPolicy(model).train()(groups_of(LOAD), temperature=1.0)
    assert result.isfinite().all()
    yield from (tensor for pointer, tensor in storages.items() if pointer not in weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", TINY)
def test_activations_are_what_autograd_keeps(model_type: str, precision: Any) -> None:
    real = tiny(model_type)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved(real, precision))
    model, half = Architecture("tiny", real, ""), precision == "bf16"
    planned = LOAD.tokens * model.training_activations(autocast=half, checkpointed=False)
    assert measured == pytest.approx(planned + half * model.half_copies, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_keeps_the_inputs_of_blocks(precision: Any) -> None:
    real = tiny("gpt_neox", num_hidden_layers=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        real.gradient_checkpointing_enable({"use_reentrant": False})
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved(real, precision))
    model = Architecture("tiny", real, "")
    half = precision == "bf16"
    one_block = model.block_activations(autocast=half)  # made again in the backward pass
    planned = LOAD.tokens * (model.training_activations(autocast=half, checkpointed=True) - one_block)
    assert measured == pytest.approx(planned, rel=0.2)


@pytest.mark.parametrize("tokens", [1, 2, 20, 33, 34, 70])
def test_the_cache_of_a_group_is_that_of_the_sampler(tokens: int) -> None:
    real = tiny("qwen2", num_key_value_heads=2).eval()
    branches, decoder = Branches(torch.arange(7), 3), SharedDecoder(real)
    with torch.inference_mode():
        for _ in range(tokens):  # the step after the last token is never made
            decoder.step([branches])
            branches.tokens = torch.tensor([1, 2, 3])
    measured = bytes_of([*branches.cache.prompt, *branches.cache.rows])
    planned = cache_tokens(Load(1, 3, 7, tokens, 7, tokens)) * Architecture("tiny", real, "").cache_bytes_per_token
    assert measured == planned


def test_the_cache_of_a_token_is_that_of_transformers() -> None:
    real = tiny("qwen2", num_key_value_heads=2).eval()
    cache: Any = real(input_ids=torch.arange(9)[None], use_cache=True).past_key_values
    measured = bytes_of(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert measured == 9 * Architecture("tiny", real, "").cache_bytes_per_token
