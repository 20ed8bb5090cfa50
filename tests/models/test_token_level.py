"""Log-probabilities and values of single tokens: the fast way against the plain twins, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from exalign.data.batching import Group, completion_token_mask
from exalign.models.capability import plan_for
from exalign.models.heads import ActorCritic, completion_values, plain_completion_values
from exalign.models.logprobs import (
    completion_logprobs,
    completion_token_logprobs,
    plain_completion_token_logprobs,
)
from exalign.models.prefix_tree import unflatten_tokens

VOCAB = 47
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 128},
    "llama": SMALL | {"model_type": "llama", "num_key_value_heads": 2},
    "mistral": SMALL | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 6},
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},  # prompts are repeated
}
SHAPE = [(7, [3, 1, 9]), (1, [4, 2]), (3, [1]), (12, [2, 6, 5, 9])]


def make_model(auto_class: Any, name: str, **more: Any) -> nn.Module:
    settings = ARCHITECTURES[name] | {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 0} | more
    model = auto_class.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.double().eval()


def make_policy(name: str) -> nn.Module:
    return make_model(AutoModelForCausalLM, name)


def make_critic(name: str) -> nn.Module:
    return make_model(AutoModelForSequenceClassification, name, num_labels=1)


def make_groups() -> list[Group]:
    def ids(length: int) -> Tensor:
        return torch.randint(0, VOCAB, (length,))

    return [Group(i, ids(prompt), tuple(map(ids, lengths))) for i, (prompt, lengths) in enumerate(SHAPE)]


def at_half(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda model, groups: function(model, groups, temperature=0.5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("make", "fast", "plain"),
    [
        (make_policy, at_half(completion_token_logprobs), at_half(plain_completion_token_logprobs)),
        (make_critic, completion_values, plain_completion_values),
    ],
    ids=["logprobs", "values"],
)
def test_tokens_and_gradients_are_those_of_the_plain_twin(name: str, make: Any, fast: Any, plain: Any) -> None:
    model, groups = make(name), make_groups()
    weight = torch.randn(4, 4, 9, dtype=torch.float64)
    found = {}
    for function in (fast, plain):
        model.zero_grad()
        values = function(model, groups)
        assert values.shape == (4, 4, 9)
        (values * weight).sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found[function] = values.detach(), torch.cat(grads)
    # Norms and rotary angles are float32 inside some of these models, whatever their weights are.
    for ours, theirs in zip(found[fast], found[plain], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert not found[fast][0][~completion_token_mask(groups)].any()
    assert plan_for(model).tree is (name != "bloom")


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_token_logprobs_add_up_to_those_of_sequences(name: str) -> None:
    model, groups = make_policy(name), make_groups()
    tokens = completion_token_logprobs(model, groups, temperature=0.8)
    whole = completion_logprobs(model, groups, temperature=0.8)
    torch.testing.assert_close(tokens.sum(dim=2), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_a_value_depends_on_what_stands_before_its_token_alone(name: str) -> None:
    model = make_critic(name)
    group = make_groups()[3]
    before = completion_values(model, [group])[0]
    torch.testing.assert_close(before[:, 0], before[:1, 0].expand(4), rtol=1e-9, atol=0)  # the prompt's, for all K
    changed = group.completion_ids[1].clone()
    changed[3] = (changed[3] + 1) % VOCAB
    other = Group(0, group.prompt_ids, (group.completion_ids[0], changed, *group.completion_ids[2:]))
    after = completion_values(model, [other])[0]
    same = (before - after).abs() < 1e-9
    assert same[1].tolist() == [True] * 4 + [False] * 2 + [True] * 3  # tokens 4 and 5 come after; then padding
    assert bool(same[[0, 2, 3]].all())


def test_a_critic_has_one_label() -> None:
    model = make_model(AutoModelForSequenceClassification, "gpt2", num_labels=2)
    for function in (completion_values, plain_completion_values):
        with pytest.raises(ValueError, match="one label"):
            function(model, make_groups())


def test_actor_and_critic_together_are_each_alone() -> None:
    """Forward and, through the vocabulary gradients that are added in place, every gradient."""
    groups, policy, critic = make_groups(), make_policy("gpt2"), make_critic("gpt2")
    expected = completion_token_logprobs(policy, groups, temperature=0.5), completion_values(critic, groups)
    sum(value.square().sum() for value in expected).backward()  # type: ignore[union-attr]
    gradients = [p.grad.clone() for model in (policy, critic) for p in model.parameters()]
    module = ActorCritic(policy, critic)
    module.zero_grad()
    found = module(groups, temperature=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    sum(value.square().sum() for value in found).backward()
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


def test_tokens_are_put_in_their_cells() -> None:
    groups = [Group(0, torch.ones(1), (torch.ones(2), torch.ones(1))), Group(1, torch.ones(1), (torch.ones(3),))]
    values, cells = torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([0, 3, 1, 6, 7, 8])
    assert unflatten_tokens(values, cells, groups).tolist() == [[[1, 3, 0], [2, 0, 0]], [[4, 5, 6], [0, 0, 0]]]
