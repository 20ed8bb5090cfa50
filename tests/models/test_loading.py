"""Loading and saving: what comes back is what was written, and wrong sources get one clear sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.models.heads import completion_outputs
from exalign.models.loading import load_classifier, load_policy, load_reward_model, load_tokenizer, save_model
from exalign.models.logprobs import completion_logprobs
from exalign.models.model_settings import LoraSettings, ModelSettings

CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}
GROUPS = [Group(0, torch.tensor([3, 4, 5]), (torch.tensor([6, 7, 0]), torch.tensor([8])))]


def test_a_saved_policy_is_an_ordinary_folder_that_computes_the_same(tmp_path: Path, tokenizer) -> None:
    model = load_policy(ModelSettings(config=CONFIG), tokenizer)
    save_model(model, tokenizer, tmp_path / "model", card="# A policy\n")
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert (tmp_path / "model" / "README.md").read_text() == "# A policy\n"
    assert not list((tmp_path / "model").glob("*.bin"))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ours = load_policy(ModelSettings(source=str(tmp_path / "model")), load_tokenizer(str(tmp_path / "model")))
    expected = completion_logprobs(model, GROUPS, temperature=0.8)
    assert torch.equal(completion_logprobs(ours, GROUPS, temperature=0.8), expected)
    assert torch.allclose(completion_logprobs(ordinary.eval(), GROUPS, temperature=0.8), expected, atol=1e-5)


def test_a_saved_lora_policy_holds_the_merged_weights_and_leaves_the_model_as_it_was(tmp_path: Path, tokenizer) -> None:
    settings = ModelSettings(config=CONFIG, lora=LoraSettings(rank=2))
    model = load_policy(settings, tokenizer)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(model, tokenizer, tmp_path / "model", card="")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = completion_logprobs(model, GROUPS, temperature=1.0)
    assert torch.allclose(completion_logprobs(plain, GROUPS, temperature=1.0), expected, atol=1e-5)


def test_a_policy_becomes_a_reward_model_with_a_new_head_and_the_same_body(tmp_path: Path, tokenizer) -> None:
    policy = load_policy(ModelSettings(config=CONFIG), tokenizer)
    save_model(policy, tokenizer, tmp_path / "policy", card="")
    reward = load_reward_model(ModelSettings(source=str(tmp_path / "policy")), tokenizer)
    assert torch.equal(reward.transformer.wte.weight, policy.transformer.wte.weight)
    save_model(reward, tokenizer, tmp_path / "reward", card="")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert again.config.num_labels == 1
    assert torch.allclose(completion_outputs(again.eval(), GROUPS), completion_outputs(reward, GROUPS), atol=1e-6)
    with pytest.raises(InputError, match="lacks weights"):
        load_policy(ModelSettings(config=None, source=str(_without_body(tmp_path / "reward"))), tokenizer)


def _without_body(folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "ln_f" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_classifier_has_two_labels_and_is_refused_as_a_reward_model(tmp_path: Path, tokenizer) -> None:
    classifier = load_classifier(ModelSettings(config=CONFIG), tokenizer)
    assert completion_outputs(classifier, GROUPS).shape == (1, 2, 2)
    save_model(classifier, tokenizer, tmp_path / "classifier", card="")
    with pytest.raises(InputError, match="has one label"):
        load_reward_model(ModelSettings(source=str(tmp_path / "classifier")), tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG | {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
        {"model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"intermediate_size": 32, "attention_dropout": 0.3, "hidden_dropout": 0.3, "max_position_embeddings": 64},
        {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"intermediate_size": 32, "attention_dropout": 0.3, "max_position_embeddings": 64},
    ],
    ids=["gpt2", "gpt_neox", "llama"],
)
def test_dropout_is_off_even_while_training(config, tokenizer) -> None:
    model = load_policy(ModelSettings(config=config), tokenizer).train()
    first, second = (completion_logprobs(model, GROUPS, temperature=1.0) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, completion_logprobs(model.eval(), GROUPS, temperature=1.0))


def test_wrong_sources_are_one_sentence(tmp_path: Path, tokenizer) -> None:
    def refused(settings: ModelSettings, pattern: str) -> None:
        with pytest.raises(InputError, match=pattern):
            load_policy(settings, tokenizer)

    refused(ModelSettings(), "either source")
    refused(ModelSettings(source="x", config=CONFIG), "either source")
    refused(ModelSettings(source=str(tmp_path / "nowhere")), "does not exist")
    refused(ModelSettings(config={"model_type": "gtp2"}), "not valid")
    refused(ModelSettings(config=CONFIG | {"vocab_size": 5}), "do not match")
    refused(ModelSettings(config=CONFIG, lora=LoraSettings(targets=("nothing",))), "LoRA")
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(tmp_path: Path, tokenizer) -> None:
    import copy

    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    without.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end-of-sequence"):
        load_tokenizer(str(tmp_path))
