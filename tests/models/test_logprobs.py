"""The fast way against the plain twin: log-probs and the gradient of every parameter, for each architecture."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from exalign.data.batching import Group
from exalign.models.capability import plan_for
from exalign.models.loading import load_policy
from exalign.models.logprobs import (
    PackedPolicy,
    completion_logprobs,
    plain_completion_logprobs,
    reference_logprobs,
)
from exalign.models.model_settings import LoraSettings, ModelSettings

VOCAB = 47
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 128}
WIDE_HEADS = GROUPED | {"head_dim": 8}
ARCHITECTURES = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 128},
    "gpt2 untied": {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "tie_word_embeddings": False},
    "gpt_neox": SMALL | {"model_type": "gpt_neox", "max_position_embeddings": 128},
    "llama": GROUPED | {"model_type": "llama"},
    "llama tied": GROUPED | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "mistral window": GROUPED | {"model_type": "mistral", "sliding_window": 6},
    "qwen2": GROUPED | {"model_type": "qwen2"},
    "qwen3": WIDE_HEADS | {"model_type": "qwen3"},
    "gemma": WIDE_HEADS | {"model_type": "gemma"},
    "gemma2": WIDE_HEADS
    | {"model_type": "gemma2", "sliding_window": 6, "query_pre_attn_scalar": 8}
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "gemma3": WIDE_HEADS
    | {"model_type": "gemma3_text", "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "afmoe": WIDE_HEADS
    | {"model_type": "afmoe", "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    | {"num_dense_layers": 2},
    "phi bias": SMALL | {"model_type": "phi", "max_position_embeddings": 128},
    "cohere scale": GROUPED | {"model_type": "cohere", "logit_scale": 0.25},
    "granite scale": GROUPED | {"model_type": "granite", "logits_scaling": 3.0},
}
RAGGED = [(7, [3, 1, 9, 2]), (1, [4]), (3, [1]), (12, [2, 2, 5, 1, 1, 7, 3, 8, 1, 2, 6, 4, 2, 9, 1, 3]), (1, [1, 1])]


class DoubleThroughout(TorchFunctionMode):
    """While open, what a model upcasts to float32 inside (norms, rotary angles, softmax) goes to float64 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def make_model(config: dict, dtype: torch.dtype = torch.float64) -> nn.Module:
    settings = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None} | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():  # far from the initial weights, where attention hardly matters
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.to(dtype).eval()


def make_groups(shape: list[tuple[int, list[int]]] = RAGGED) -> list[Group]:
    def draw(length: int) -> Tensor:
        return torch.randint(VOCAB, (length,))

    return [
        Group(i, draw(prompt), tuple(draw(length) for length in lengths)) for i, (prompt, lengths) in enumerate(shape)
    ]


def exactly(logprobs, model: nn.Module, batches: list[list[Group]]) -> tuple[Tensor, dict[str, Tensor]]:
    """`with_gradients` of a float64 model, in float64 throughout."""
    with DoubleThroughout():
        return with_gradients(logprobs, model, batches)


def with_gradients(logprobs, model: nn.Module, batches: list[list[Group]]) -> tuple[Tensor, dict[str, Tensor]]:
    """All log-probs, and the gradient of a weighted sum of them that weighs every completion differently."""
    model.zero_grad()
    values = []
    for batch in batches:
        logp = logprobs(model, batch, temperature=0.8)
        weight = torch.tensor([[1.0 + 0.3 * group.index - 0.7 * i for i in range(logp.shape[1])] for group in batch])
        (logp * weight).sum().backward()
        values += [row[: group.num_completions] for group, row in zip(batch, logp.detach(), strict=True)]
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(values), grads


def assert_same(ours, theirs, tolerance: float) -> None:
    assert torch.allclose(ours[0], theirs[0].to(ours[0].dtype), atol=tolerance, rtol=0)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(grad.abs().max().item() for grad in theirs[1].values())
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).abs().max() <= tolerance * max(1.0, largest), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_and_gradients_are_those_of_plain_rows(name, caplog) -> None:
    model, groups = make_model(ARCHITECTURES[name]), make_groups()
    plain = exactly(plain_completion_logprobs, model, [groups])
    with caplog.at_level(logging.WARNING, logger="exalign"):
        assert_same(exactly(completion_logprobs, model, [groups]), plain, 1e-9)
    assert plan_for(model).tree
    assert not [record for record in caplog.records if record.name.startswith("exalign")]
    splits = [[groups[4], groups[1]], [groups[3]], [groups[0], groups[2]]]
    order = [4, 1, 3, 0, 2]
    values, grads = exactly(completion_logprobs, model, splits)
    parts = dict(zip(order, values.split([groups[i].num_completions for i in order]), strict=True))
    assert_same((torch.cat([parts[i] for i in range(5)]), grads), plain, 1e-9)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3"])
def test_single_precision_agrees_to_rounding(name) -> None:
    model, groups = make_model(ARCHITECTURES[name], torch.float32), make_groups()
    plain = with_gradients(plain_completion_logprobs, model, [groups])
    ours = with_gradients(completion_logprobs, model, [groups])
    assert ours[0].dtype == torch.float32
    assert_same(ours, plain, 1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "gemma3"])
def test_activation_checkpointing_changes_nothing(name, reentrant) -> None:
    model, groups = make_model(ARCHITECTURES[name]).train(), make_groups()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = model.config.attn_pdrop = 0.0
    expected = with_gradients(completion_logprobs, model, [groups])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(with_gradients(completion_logprobs, model, [groups]), expected, 1e-10)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [None, ("c_attn", "c_fc", "lm_head"), ("lm_head",)])
def test_adapters_on_body_and_head(tokenizer, targets, dora) -> None:
    lora = LoraSettings(rank=3, targets=targets, dora=dora)
    model = load_policy(ModelSettings(config=ARCHITECTURES["gpt2 untied"], lora=lora), tokenizer).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            nn.init.normal_(parameter, std=0.3)
    groups = make_groups()
    expected = exactly(plain_completion_logprobs, model, [groups])
    assert expected[1]
    assert all("lora" in name for name in expected[1])
    assert_same(exactly(completion_logprobs, model, [groups]), expected, 1e-9)


@pytest.mark.parametrize("frozen", ["lm_head", "transformer"])
def test_frozen_head_or_body(frozen) -> None:
    model, groups = make_model(ARCHITECTURES["gpt2 untied"]), make_groups()
    getattr(model, frozen).requires_grad_(False)
    expected = exactly(plain_completion_logprobs, model, [groups])
    assert_same(exactly(completion_logprobs, model, [groups]), expected, 1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_half_precision_models_give_float32_near_the_exact_value(name) -> None:
    exact, groups = make_model(ARCHITECTURES[name]), make_groups()
    expected = completion_logprobs(exact, groups, temperature=0.8)
    ours = completion_logprobs(exact.bfloat16(), groups, temperature=0.8)
    assert ours.dtype == torch.float32
    assert plan_for(exact).tree
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_autocast_gives_values_near_the_exact_ones_whatever_types_meet_in_the_attention(name) -> None:
    """GPT-NeoX rotates queries and keys in float32 beside half precision values."""
    model, groups = make_model(ARCHITECTURES[name], torch.float32), make_groups()
    expected = completion_logprobs(model, groups, temperature=0.8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = completion_logprobs(model, groups, temperature=0.8)
    ours.sum().backward()
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_without_a_stream_the_model_is_what_it_was() -> None:
    for name in ("gpt2", "gemma2", "gemma3"):
        model = make_model(ARCHITECTURES[name], torch.float32)
        row, mask = torch.randint(VOCAB, (2, 9)), torch.ones(2, 9, dtype=torch.long)
        mask[1, :3] = 0
        before = model(input_ids=row, attention_mask=mask).logits
        generated = model.generate(row, attention_mask=mask, max_new_tokens=5, do_sample=False)
        completion_logprobs(model, make_groups(), temperature=1.0)
        assert torch.equal(model(input_ids=row, attention_mask=mask).logits, before)
        again = model.generate(row, attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert torch.equal(generated, again)
        assert "sharing_over" not in model.config.to_json_string(use_diff=False)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}, "attention interface"),
        (SMALL | {"model_type": "mamba", "state_size": 4}, "attention interface"),
    ],
    ids=["bloom", "mamba"],
)
def test_other_architectures_take_padded_rows_and_say_why_once(config, reason, caplog) -> None:
    model, groups = make_model(config), make_groups()
    with caplog.at_level(logging.WARNING, logger="exalign"):
        ours = exactly(completion_logprobs, model, [groups])
        completion_logprobs(model, groups, temperature=1.0)
    said = [record.message for record in caplog.records if record.name.startswith("exalign")]
    assert len(said) == 1
    assert reason in said[0]
    assert_same(ours, exactly(plain_completion_logprobs, model, [groups]), 1e-9)


def test_a_head_that_the_formula_does_not_know_gets_full_logits(caplog) -> None:
    model, groups = make_model(ARCHITECTURES["cohere scale"]), make_groups()
    model.config.logit_scale = 7.0  # what the config says is no longer what the model does
    with caplog.at_level(logging.WARNING, logger="exalign"):
        ours = exactly(completion_logprobs, model, [groups])
    assert "full logits" in caplog.text
    assert_same(ours, exactly(plain_completion_logprobs, model, [groups]), 1e-9)


def test_a_packed_policy_computes_the_same_wrapped_or_bare() -> None:
    model, groups = make_model(ARCHITECTURES["llama"]), make_groups()
    expected = completion_logprobs(model, groups, temperature=0.8)
    packed = PackedPolicy(model)
    assert torch.equal(completion_logprobs(packed, groups, temperature=0.8), expected)
    assert torch.equal(completion_logprobs(nn.DataParallel(packed), groups, temperature=0.8), expected)


@pytest.mark.parametrize("name", ["gpt2", "gpt2 untied", "llama tied", "phi bias", "gemma2", "gemma3"])
def test_a_packed_policy_adds_the_same_gradients_batch_after_batch(name) -> None:
    settings = ARCHITECTURES[name] | {"pad_token_id": 3}  # whose embedding transformers does not train
    model, groups = make_model(settings), make_groups()
    batches = [[groups[3]], groups[:3], [groups[4]]]
    expected = exactly(completion_logprobs, model, batches)
    packed = exactly(completion_logprobs, PackedPolicy(model), batches)
    assert_same(packed, (expected[0], {f"model.{key}": grad for key, grad in expected[1].items()}), 1e-10)


def test_reference_log_probs_are_those_of_training_for_any_budget() -> None:
    model, groups = make_model(ARCHITECTURES["gpt2"]), make_groups()
    expected = completion_logprobs(model, groups, temperature=0.8).detach()
    for budget in (1, 40, 10_000):
        found = reference_logprobs(model, groups, temperature=0.8, token_budget=budget)
        for row, wanted, group in zip(found, expected, groups, strict=True):
            assert row.shape == (group.num_completions,)
            assert not row.requires_grad
            assert torch.allclose(row, wanted[: group.num_completions], atol=1e-10)


def test_a_temperature_that_is_not_positive_is_refused() -> None:
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            completion_logprobs(nn.Linear(1, 1), make_groups(), temperature=temperature)
