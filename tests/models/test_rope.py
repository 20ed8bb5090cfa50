"""Rotary embeddings that look at lengths: every log-probability and score is that of its own text alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.models.capability import RopeSwitch, check_positions, plan_for, rope_switch
from exalign.models.heads import completion_outputs, completion_values
from exalign.models.logprobs import completion_logprobs, completion_token_logprobs, plain_completion_logprobs

VOCAB, LIMIT = 47, 16
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 5.0, 9.0, 17.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
CONFIGS = {
    "longrope phi3": {
        "model_type": "phi3",
        "max_position_embeddings": 64,
        "original_max_position_embeddings": LIMIT,
        "rope_parameters": LONG | {"original_max_position_embeddings": LIMIT},
    },
    "dynamic llama": {"model_type": "llama", "max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC},
    "dynamic of one kind of layer": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": LIMIT,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": DYNAMIC,
        },
    },
    "dynamic in rows": {"model_type": "cohere2", "max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC},
}
# On both sides of the limit: groups that lie apart, groups that straddle it, and one that meets it exactly.
SHAPES = [(3, [4, 2]), (14, [9, 11, 20]), (10, [2, 30, 6, 7, 1]), (20, [1]), (1, [15, 14, 16]), (5, [3])]


def make_model(name: str, auto: type = AutoModelForCausalLM, **more: object) -> nn.Module:
    settings = SMALL | CONFIGS[name] | more
    torch.manual_seed(3)
    model = auto.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if name == "dynamic in rows":
        model._supports_attention_backend = False
    return model


def make_groups() -> list[Group]:
    draw = torch.Generator().manual_seed(5)
    return [
        Group(
            i,
            torch.randint(VOCAB, (prompt,), generator=draw),
            tuple(torch.randint(VOCAB, (length,), generator=draw) for length in lengths),
        )
        for i, (prompt, lengths) in enumerate(SHAPES)
    ]


def alone(name: str, group: Group, i: int) -> Tensor:
    """log π(y_i|x) by a model that was just made and reads nothing else."""
    row = torch.cat([group.prompt_ids, group.completion_ids[i]])
    with torch.no_grad():
        logps = make_model(name)(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, row[1:, None])[len(group.prompt_ids) - 1 :].sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_log_probability_is_that_of_its_text_alone_whatever_stands_or_came_before_it(name) -> None:
    model, groups = make_model(name), make_groups()
    assert plan_for(model).tree == (name != "dynamic in rows")
    expected = [[alone(name, group, i) for i in range(group.num_completions)] for group in groups]
    for batches in ([groups], [[group] for group in groups], [groups[3:], groups[:3]], [groups[::-1]]):
        for logprobs in (completion_logprobs, plain_completion_logprobs):
            for batch in batches:
                found = logprobs(model, batch, temperature=1.0).detach()
                for row, group in zip(found, batch, strict=True):
                    for value, wanted in zip(row, expected[group.index], strict=False):
                        assert value == pytest.approx(float(wanted), abs=2e-4)


def test_the_case_is_one_in_which_the_batch_would_matter() -> None:
    for name in list(CONFIGS)[:2]:
        ids = torch.cat([make_groups()[1].prompt_ids, make_groups()[1].completion_ids[2]])[None]
        model = make_model(name)
        short = model.base_model(input_ids=ids[:, :LIMIT], use_cache=False).last_hidden_state[0]
        positions = torch.cat([torch.arange(LIMIT), torch.tensor([33])])[None]
        longer = model.base_model(input_ids=ids[:, : LIMIT + 1], position_ids=positions, use_cache=False)
        assert (longer.last_hidden_state[0, :LIMIT] - short).abs().max() > 0.05


@pytest.mark.parametrize("name", ["longrope phi3", "dynamic llama"])
def test_gradients_tokens_and_scores_follow(name) -> None:
    model, groups = make_model(name), make_groups()
    grads = []
    for logprobs in (completion_logprobs, plain_completion_logprobs):
        model.zero_grad()
        (logprobs(model, groups, temperature=1.0) * torch.arange(1.0, 6.0)).sum().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()
    tokens = completion_token_logprobs(model, groups, temperature=1.0).sum(dim=2)
    torch.testing.assert_close(tokens, completion_logprobs(model, groups, temperature=1.0), atol=1e-4, rtol=0)
    scorer = make_model(name, AutoModelForSequenceClassification, num_labels=1)
    scorer.requires_grad_(False)
    scores, values = completion_outputs(scorer, groups)[..., 0], completion_values(scorer, groups)
    for group in groups:
        for i, ids in enumerate(group.completion_ids):
            part = [Group(0, group.prompt_ids, (ids,))]
            assert scores[group.index, i] == pytest.approx(float(completion_outputs(scorer, part)), abs=2e-4)
            own = completion_values(scorer, part)[0, 0]
            torch.testing.assert_close(values[group.index, i, : len(ids)], own, atol=2e-4, rtol=0)


def test_where_a_rotary_embedding_changes_is_read_from_the_config() -> None:
    found = {name: rope_switch(make_model(name).config) for name in CONFIGS}
    assert found.pop("longrope phi3") == RopeSwitch(LIMIT, every=False)
    assert set(found.values()) == {RopeSwitch(LIMIT, every=True)}
    assert rope_switch(AutoConfig.for_model("llama", **SMALL)) is None
    assert rope_switch(AutoConfig.for_model("gpt2")) is None


def test_positions_are_checked_before_any_work() -> None:
    gpt2, llama = AutoConfig.for_model("gpt2", n_positions=128), AutoConfig.for_model("llama", **SMALL)
    llama.max_position_embeddings = 128
    for config in (gpt2, llama, AutoConfig.for_model("bloom")):
        assert check_positions(config, 128, settings="a + b", samples=True) is None
    with pytest.raises(InputError, match=r"^a \+ b is 129, but the model has 128 positions; lower one of them.$"):
        check_positions(gpt2, 129, settings="a + b", samples=False)
    said = check_positions(llama, 129, settings="a + b", samples=True)
    assert said == "a + b is 129, but the model was made for 128 positions; longer texts may come out poorly."
    phi = make_model("longrope phi3").config
    assert check_positions(phi, 64, settings="a + b", samples=False) is None
    with pytest.raises(InputError, match=r"^a \+ b is 17, but the model's rotary embedding changes beyond 16 tokens"):
        check_positions(phi, 17, settings="a + b", samples=True)
