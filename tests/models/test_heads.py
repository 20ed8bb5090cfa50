"""Scores read at the last real token: the fast way against rows alone, whatever stands beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from exalign.data.batching import Group
from exalign.models.capability import plan_for
from exalign.models.heads import PackedScorer, completion_outputs, completion_values, plain_completion_outputs

VOCAB = 47
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ARCHITECTURES = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 128},
    "gpt_neox": SMALL | {"model_type": "gpt_neox", "max_position_embeddings": 128},
    "llama": SMALL | {"model_type": "llama", "num_key_value_heads": 2},
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "bert": SMALL | {"model_type": "bert", "max_position_embeddings": 128},
}


def make_scorer(name: str, num_labels: int) -> nn.Module:
    settings = ARCHITECTURES[name] | {
        "vocab_size": VOCAB,
        "num_labels": num_labels,
        "pad_token_id": 0,
        "eos_token_id": 0,
    }
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.double().eval()


def make_groups() -> list[Group]:
    """Ragged, with an end-of-sequence token (which is also the padding token here) at the end of some."""
    shape = [(7, [3, 1]), (1, [4, 2]), (3, [1]), (12, [2, 6, 5, 9])]

    def completion(length: int) -> Tensor:
        ids = torch.randint(1, VOCAB, (length,))
        ids[-1] = 0 if length % 2 else ids[-1]
        return ids

    return [
        Group(i, torch.randint(1, VOCAB, (p,)), tuple(map(completion, lengths))) for i, (p, lengths) in enumerate(shape)
    ]


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_are_those_of_rows_alone(name, num_labels) -> None:
    model, groups = make_scorer(name, num_labels), make_groups()
    weight = torch.randn(4, 4, num_labels, dtype=torch.float64)
    found = {}
    for outputs in (completion_outputs, plain_completion_outputs):
        model.zero_grad()
        values = outputs(model, groups)
        assert values.shape == (4, 4, num_labels)
        (values * weight).sum().backward()
        found[outputs] = values.detach(), [p.grad for p in model.parameters() if p.grad is not None]
    (ours, our_grads), (theirs, their_grads) = found.values()
    assert torch.allclose(ours, theirs, atol=1e-5)  # norms and rotary angles are float32 inside
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(our_grads, their_grads, strict=True))
    assert plan_for(model).tree == (name not in ("bloom", "bert"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_a_score_does_not_depend_on_its_neighbours(name) -> None:
    model, groups = make_scorer(name, 1), make_groups()
    together = completion_outputs(model, groups)
    for row, group in zip(together, groups, strict=True):
        for i, ids in enumerate(group.completion_ids):
            alone = completion_outputs(model, [Group(0, group.prompt_ids, (ids,))])
            assert torch.allclose(alone[0, 0], row[i], atol=1e-6)
        assert (row[group.num_completions :] == 0).all()


def test_the_score_is_read_at_the_end_token_even_where_it_is_the_padding_token() -> None:
    model = make_scorer("gpt2", 1)
    prompt, ids = torch.tensor([3, 4]), torch.tensor([5, 0])
    ended = completion_outputs(model, [Group(0, prompt, (ids,))])
    cut = completion_outputs(model, [Group(0, prompt, (ids[:1],))])
    assert (ended - cut).abs().max() > 1e-3
    assert torch.allclose(
        ended[0, 0], model.score(model.transformer(torch.cat([prompt, ids])[None])[0][0, -1]), atol=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_autocast_nor_weights_of_16_bits_round_scores_and_values(dtype) -> None:
    model, groups = make_scorer("llama", 1).to(dtype), make_groups()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        scores, values = completion_outputs(model, groups), completion_values(model, groups)
    for found in (scores, values):
        there = found[found != 0]
        assert there.dtype == torch.float32 and (there != there.bfloat16()).float().mean() > 0.5
    (scores.sum() + values.sum()).backward()
    assert all(bool(weight.grad.any()) for weight in model.score.parameters())


def test_a_packed_scorer_computes_the_same_wrapped_or_bare() -> None:
    model, groups = make_scorer("llama", 1), make_groups()
    expected = completion_outputs(model, groups)
    packed = PackedScorer(model)
    assert torch.equal(completion_outputs(packed, groups), expected)
    assert torch.equal(completion_outputs(nn.DataParallel(packed), groups), expected)
