"""Loading and saving: what comes back is what was written, and wrong sources get one clear sentence."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from exalign.checksums import write_sums
from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.models.heads import completion_outputs
from exalign.models.loading import (
    check_trainable,
    check_weights,
    load_classifier,
    load_policy,
    load_reward_model,
    load_scoring_model,
    load_tokenizer,
    save_model,
)
from exalign.models.logprobs import PackedPolicy, completion_logprobs
from exalign.models.model_settings import LoraSettings, ModelSettings, adapter_base

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


@pytest.mark.parametrize("load", [load_policy, load_reward_model])
def test_the_token_that_ends_texts_is_trained_where_it_is_the_padding_too(load, tmp_path: Path, tokenizer) -> None:
    """transformers gives the padding's embedding no gradient, and a saved policy names the end token its padding."""
    first = load_policy(ModelSettings(config=LLAMA | {"pad_token_id": None}), tokenizer)
    save_model(first, tokenizer, tmp_path / "model", card="")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"] == tokenizer.eos_token_id == 0
    model = load(ModelSettings(source=str(tmp_path / "model")), tokenizer)
    groups = [Group(0, torch.tensor([3, 0, 4]), (torch.tensor([6, 7, 0]),))]
    if load is load_policy:
        completion_logprobs(PackedPolicy(model), groups, temperature=1.0).sum().backward()
    else:
        completion_outputs(model, groups).sum().backward()
    assert model.get_input_embeddings().weight.grad[0].abs().max() > 0


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
    write_sums(folder)
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
        {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
        | {"word_embed_proj_dim": 16, "layerdrop": 0.5, "max_position_embeddings": 64},
        {"model_type": "phimoe", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 4, "router_jitter_noise": 0.3}
        | {"max_position_embeddings": 64},
    ],
    ids=["gpt2", "gpt_neox", "llama", "opt", "phimoe"],
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
    with pytest.raises(InputError, match="Cannot load the tokenizer xxx"):
        load_tokenizer("x" * 300)  # longer than a name of a file can be
    assert adapter_base(Path("x" * 300)) is None


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="there is no file that nobody can read from")
@pytest.mark.parametrize("name", ["SHA256SUMS", "config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_cannot_be_read_are_one_sentence(name, tmp_path: Path, tokenizer) -> None:
    """As on a disk that is failing, or of another user's."""
    folder = tmp_path / "model"
    save_model(load_policy(ModelSettings(config=CONFIG), tokenizer), tokenizer, folder, card="")
    for vouched in (True, False):
        if not vouched:
            (folder / "SHA256SUMS").unlink()
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/proc/self/mem")
        with pytest.raises(InputError, match=f"{tmp_path}.*"):
            load_policy(ModelSettings(source=str(folder)), load_tokenizer(str(folder)))


def test_settings_of_other_types_than_anybody_writes_are_one_sentence(tmp_path: Path, tokenizer) -> None:
    save_model(load_policy(ModelSettings(config=CONFIG), tokenizer), tokenizer, tmp_path, card="")
    (tmp_path / "SHA256SUMS").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [3], "num_labels": 2}))
    assert load_classifier(ModelSettings(source=str(tmp_path)), tokenizer).config.num_labels == 2
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": ["gpt2"]}))
    with pytest.raises(InputError, match="Cannot load the model"):
        load_scoring_model(str(tmp_path), tokenizer)
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="Cannot load the model"):
        check_weights(str(tmp_path))


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(tmp_path: Path, tokenizer) -> None:
    import copy

    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    without.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end-of-sequence"):
        load_tokenizer(str(tmp_path))


LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 24, "max_position_embeddings": 64}


def _moved(model: nn.Module) -> nn.Module:
    """As after some training: nothing is where it began."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim >= 2:
                parameter.add_(torch.randn_like(parameter).to(parameter.dtype), alpha=0.3)
    return model


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (CONFIG, ("lm_head", "c_attn")),
        (CONFIG, ("wte",)),
        (LLAMA | {"tie_word_embeddings": True}, ("lm_head", "q_proj")),
        (LLAMA | {"tie_word_embeddings": True}, ("embed_tokens", "lm_head")),
        (LLAMA | {"tie_word_embeddings": True}, ("q_proj",)),
    ],
)
def test_adapters_on_a_tied_matrix_are_saved_as_they_were_trained(config, targets, tmp_path: Path, tokenizer) -> None:
    settings = ModelSettings(config=config, lora=LoraSettings(rank=2, targets=targets))
    model = _moved(load_policy(settings, tokenizer))
    save_model(model, tokenizer, tmp_path / "model", card="", rows=GROUPS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert plain.config.tie_word_embeddings == (targets == ("q_proj",))
    expected = completion_logprobs(model, GROUPS, temperature=1.0)
    assert torch.allclose(completion_logprobs(plain, GROUPS, temperature=1.0), expected, atol=1e-4)


def test_what_would_be_another_model_is_not_saved(tmp_path: Path, tokenizer) -> None:
    """Adapters on a head that stays tied: merging adds to the embedding as well."""
    tied = load_policy(ModelSettings(config=LLAMA | {"tie_word_embeddings": True}), tokenizer)
    model = _moved(get_peft_model(tied, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")))
    with pytest.raises(InputError, match=r"cannot be saved .* log-probability of .* in transformers"):
        save_model(model, tokenizer, tmp_path / "model", card="", rows=GROUPS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_on_half_precision_are_saved_within_its_rounding(dtype, tmp_path: Path, tokenizer) -> None:
    settings = ModelSettings(config=LLAMA, dtype=dtype, lora=LoraSettings(rank=2))
    save_model(_moved(load_policy(settings, tokenizer)), tokenizer, tmp_path / "model", card="", rows=GROUPS)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("config", "load"), [(CONFIG, load_reward_model), (LLAMA, load_reward_model), (LLAMA, load_classifier)]
)
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
@pytest.mark.parametrize("more", [0, 3])
def test_a_scalar_head_gives_the_same_in_transformers(config, load, lora, more, tmp_path: Path, tokenizer) -> None:
    """The tokenizer pads with the end of a text, the token that the head reads; what is saved has its own padding."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    size = len(tokenizer) + more
    model = _moved(load(ModelSettings(config=config | {"vocab_size": size}, lora=lora), tokenizer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(model, tokenizer, tmp_path / "model", card="", rows=GROUPS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.vocab_size == size and model.config.pad_token_id is None
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    padded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert padded.pad_token_id == plain.config.pad_token_id == len(tokenizer) != padded.eos_token_id
    assert plain.get_input_embeddings().num_embeddings == max(size, len(tokenizer) + 1)
    texts = [torch.cat([group.prompt_ids, ids]) for group in GROUPS for ids in group.completion_ids]
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=padded.pad_token_id)
    with torch.no_grad():
        found = plain(input_ids=ids, attention_mask=(ids != padded.pad_token_id).long()).logits
        assert torch.allclose(found, completion_outputs(model, GROUPS)[0], atol=1e-5)


@pytest.mark.parametrize("special", [{"bos_token_id": 47}, {"eos_token_id": [0, 47]}])
def test_a_scalar_head_is_not_read_before_a_second_token_that_ends_texts(special, tmp_path: Path, tokenizer) -> None:
    """Qwen pads with <|endoftext|>, which its configuration has begin a text and which ends some of its samples."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    assert tokenizer.pad_token_id == 47
    model = load_reward_model(ModelSettings(config=LLAMA | special), tokenizer)
    ended = [Group(0, torch.tensor([3, 4]), (torch.tensor([6, 47]), torch.tensor([8, 0])))]
    save_model(model, tokenizer, tmp_path / "model", card="", rows=ended)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert plain.config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id == 48


@pytest.mark.parametrize("own", [None, "w40"])
def test_a_scalar_head_trained_again_is_padded_with_what_it_takes_for_padding(own, tmp_path: Path, tokenizer) -> None:
    """The tokenizer of a run is its policy's, which does not know the padding that the model was saved with before."""
    first = _moved(load_reward_model(ModelSettings(config=LLAMA), tokenizer))
    save_model(first, tokenizer, tmp_path / "first", card="")
    policys = copy.deepcopy(tokenizer)
    policys.add_special_tokens({"pad_token": own} if own else {})
    model = load_reward_model(ModelSettings(source=str(tmp_path / "first")), policys)
    save_model(model, policys, tmp_path / "again", card="", rows=GROUPS)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    padded = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert padded.pad_token_id == plain.config.pad_token_id != padded.eos_token_id
    texts = [[*group.prompt_ids.tolist(), *ids.tolist()] for group in GROUPS for ids in group.completion_ids]
    with torch.no_grad():
        found = plain(**padded.pad({"input_ids": texts}, return_tensors="pt")).logits
        assert torch.allclose(found, completion_outputs(first, GROUPS)[0], atol=1e-5)


def test_a_generation_config_that_contradicts_itself_is_mended(tmp_path: Path, tokenizer) -> None:
    save_model(load_policy(ModelSettings(config=LLAMA), tokenizer), tokenizer, tmp_path / "model", card="")
    path, config = tmp_path / "model" / "generation_config.json", tmp_path / "model" / "config.json"
    said = {"eos_token_id": [0, 5], "do_sample": False, "temperature": 0.9, "top_p": 0.6}
    for more, own in ((said, {}), ({}, {"temperature": 0.7}), (said | {"length_penalty": 2.0}, {"top_k": 3})):
        path.write_text(json.dumps(said | more))
        config.write_text(json.dumps(json.loads(config.read_text()) | own))
        write_sums(config.parent)
        model = load_policy(ModelSettings(source=str(tmp_path / "model")), tokenizer)
        save_model(model, tokenizer, tmp_path / "again", card="", rows=GROUPS)
        again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
        assert again["eos_token_id"] == [0, 5]
        assert ("temperature" in again) == ("length_penalty" not in more) == again.get("do_sample", False)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("config", [CONFIG, LLAMA | {"tie_word_embeddings": True}])
def test_an_adapter_alone_is_the_policy_that_was_trained(config, dora, tmp_path: Path, tokenizer) -> None:
    base = load_policy(ModelSettings(config=config), tokenizer)
    save_model(base, tokenizer, tmp_path / "base", card="")
    expected = completion_logprobs(base, GROUPS, temperature=1.0)
    lora = LoraSettings(rank=2, dora=dora, save="adapter")
    model = load_policy(ModelSettings(source=str(tmp_path / "base"), lora=lora), tokenizer)
    torch.testing.assert_close(completion_logprobs(model, GROUPS, temperature=1.0), expected, atol=1e-5, rtol=0)
    trained = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
    assert any("magnitude" in name for name in trained) == dora
    before = {name: weights.clone() for name, weights in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    for _ in range(2):  # the first moves B and the lengths alone
        completion_logprobs(model, GROUPS, temperature=1.0).sum().neg().backward()
        optimizer.step()
    assert not [name for name, weights in trained.items() if torch.equal(weights, before[name])]
    moved = completion_logprobs(model, GROUPS, temperature=1.0)
    assert (moved - expected).abs().min() > 0.01
    save_model(model, tokenizer, tmp_path / "policy", card="# A policy\n", rows=GROUPS)
    assert not (tmp_path / "policy" / "config.json").exists()
    assert (tmp_path / "policy" / "README.md").read_text() == "# A policy\n"
    for found in (
        load_policy(ModelSettings(source=str(tmp_path / "policy")), load_tokenizer(str(tmp_path / "policy"))),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy").eval(),
    ):
        again = completion_logprobs(found, GROUPS, temperature=1.0)
        torch.testing.assert_close(again, moved, atol=1e-4, rtol=0)


def test_an_adapter_alone_needs_a_whole_base_and_dora_a_direction(tmp_path: Path, tokenizer) -> None:
    lora = LoraSettings(rank=2, save="adapter")
    with pytest.raises(InputError, match="lies in no folder for the adapter to name"):
        load_policy(ModelSettings(config=LLAMA, lora=lora), tokenizer)
    save_model(load_policy(ModelSettings(config=LLAMA), tokenizer), tokenizer, tmp_path / "base", card="")
    first = load_policy(ModelSettings(source=str(tmp_path / "base"), lora=lora), tokenizer)
    save_model(first, tokenizer, tmp_path / "first", card="")
    with pytest.raises(InputError, match=r"first is an adapter itself.*set save: merged"):
        load_policy(ModelSettings(source=str(tmp_path / "first"), lora=lora), tokenizer)
    tied = LLAMA | {"tie_word_embeddings": True, "pad_token_id": 5}  # whose row of zeros the head shares
    with pytest.raises(InputError, match=r"lora\.dora: lm_head has outputs without any weight"):
        load_policy(ModelSettings(config=tied, lora=LoraSettings(dora=True, targets=("lm_head",))), tokenizer)


class TestAnAdaptersFolder:
    def trained(self, tmp_path: Path, tokenizer, *, more: int = 0, targets=("q_proj", "v_proj")):
        """An adapter beside its base, and the model that both are; `more` tokens were added for it."""
        save_model(load_policy(ModelSettings(config=LLAMA), tokenizer), tokenizer, tmp_path / "base", card="")
        base, own = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), copy.deepcopy(tokenizer)
        own.add_tokens([f"new{i}" for i in range(more)])
        base.resize_token_embeddings(len(own))
        saved = ["embed_tokens", "lm_head"] if more else None
        config = LoraConfig(r=2, target_modules=list(targets), modules_to_save=saved, task_type="CAUSAL_LM")
        model = _moved(get_peft_model(base, config)).eval()
        model.save_pretrained(tmp_path / "adapter")
        own.save_pretrained(tmp_path / "adapter")
        return model, own

    @pytest.mark.parametrize("more", [0, 3])
    def test_loads_on_its_base(self, more, tmp_path: Path, tokenizer) -> None:
        model, own = self.trained(tmp_path, tokenizer, more=more)
        found = load_policy(ModelSettings(source=str(tmp_path / "adapter")), own).eval()
        ids = torch.tensor([[3, 4, len(own) - 1, 6]])
        with torch.no_grad():
            assert torch.allclose(found(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
            anew = load_policy(ModelSettings(source=str(tmp_path / "adapter"), lora=LoraSettings(rank=3)), own).eval()
            assert torch.equal(anew(input_ids=ids).logits, found(input_ids=ids).logits)
        assert all(weights.requires_grad for weights in found.parameters())
        assert {weights.requires_grad for weights in anew.parameters()} == {True, False}
        save_model(found, own, tmp_path / "whole", card="", rows=GROUPS)
        assert (tmp_path / "whole" / "config.json").exists()

    def test_without_its_base_is_one_sentence(self, tmp_path: Path, tokenizer) -> None:
        self.trained(tmp_path, tokenizer)
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
        with pytest.raises(InputError, match=r"adapter holds a LoRA adapter alone.*gone does not exist"):
            load_policy(ModelSettings(source=str(tmp_path / "adapter")), tokenizer)
        for text in ("{}", "[" * 100_000):
            path.write_text(text)
            with pytest.raises(InputError, match="does not name the model"):
                load_policy(ModelSettings(source=str(tmp_path / "adapter")), tokenizer)
        path.unlink()
        path.mkdir()
        with pytest.raises(InputError, match="does not name the model"):
            load_policy(ModelSettings(source=str(tmp_path / "adapter")), tokenizer)

    def test_that_does_not_fit_is_one_sentence(self, tmp_path: Path, tokenizer) -> None:
        self.trained(tmp_path, tokenizer)
        other = ModelSettings(config=LLAMA | {"hidden_size": 32})
        save_model(load_policy(other, tokenizer), tokenizer, tmp_path / "base", card="")
        with pytest.raises(InputError, match="does not fit its base"):
            load_policy(ModelSettings(source=str(tmp_path / "adapter")), tokenizer)

    @pytest.mark.parametrize("kept", [".layers.0.", "nothing"])
    def test_that_lacks_weights_is_refused(self, kept, tmp_path: Path, tokenizer) -> None:
        self.trained(tmp_path, tokenizer)
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({name: value for name, value in load_file(file).items() if kept in name}, file)
        with pytest.raises(
            InputError, match=r"does not fit its base \(\d of its weights have no counterpart, as .*lora_"
        ):
            load_policy(ModelSettings(source=str(tmp_path / "adapter")), tokenizer)

    def test_of_a_deeper_model_is_refused(self, tmp_path: Path, tokenizer) -> None:
        self.trained(tmp_path, tokenizer)
        shallow = load_policy(ModelSettings(config=LLAMA | {"num_hidden_layers": 1}), tokenizer)
        save_model(shallow, tokenizer, tmp_path / "base", card="")
        with pytest.raises(InputError, match=r"4 of its weights have no counterpart, as .*layers\.1\."):
            load_policy(ModelSettings(source=str(tmp_path / "adapter")), tokenizer)

    def test_of_prompts_that_were_learnt_is_refused(self, tmp_path: Path, tokenizer) -> None:
        save_model(load_policy(ModelSettings(config=LLAMA), tokenizer), tokenizer, tmp_path / "base", card="")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        learnt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        get_peft_model(base, learnt).save_pretrained(tmp_path / "adapter")
        with pytest.raises(InputError, match="prompts and prefixes that were learnt cannot be merged"):
            load_policy(ModelSettings(source=str(tmp_path / "adapter")), tokenizer)

    def test_with_the_base_s_configuration_beside_it_is_an_adapter_still(self, tmp_path: Path, tokenizer) -> None:
        model, own = self.trained(tmp_path, tokenizer)
        shutil.copy(tmp_path / "base" / "config.json", tmp_path / "adapter")
        found = load_policy(ModelSettings(source=str(tmp_path / "adapter")), own).eval()
        ids = torch.tensor([[3, 4, 5, 6]])
        with torch.no_grad():
            assert torch.allclose(found(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)

    def test_with_a_whole_model_in_it_is_refused(self, tmp_path: Path, tokenizer) -> None:
        """transformers would add the one to the other."""
        self.trained(tmp_path, tokenizer)
        (tmp_path / "base" / "SHA256SUMS").unlink()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(tmp_path / "adapter" / name, tmp_path / "base")
        with pytest.raises(InputError, match="base holds an adapter beside a whole model"):
            load_policy(ModelSettings(source=str(tmp_path / "base")), tokenizer)

    def test_on_itself_or_nothing_is_refused(self, tmp_path: Path, tokenizer) -> None:
        self.trained(tmp_path, tokenizer)
        path, folder = tmp_path / "adapter" / "adapter_config.json", str(tmp_path / "adapter")
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"base_model_name_or_path": folder}))
        with pytest.raises(InputError, match=r"stands on .*adapter, an adapter itself"):
            check_weights(folder)
        path.write_text(json.dumps(values | {"base_model_name_or_path": None}))
        with pytest.raises(InputError, match="does not name the model"):
            check_weights(folder)

    @pytest.mark.parametrize(
        ("targets", "tying", "refused"),
        [(".*(lm_head|q_proj)", False, None), (["q_proj", "embed_tokens"], True, "tied cannot be merged")],
    )
    def test_on_a_tied_matrix(self, targets, tying, refused, tmp_path: Path, tokenizer) -> None:
        tied = ModelSettings(config=LLAMA | {"tie_word_embeddings": True})
        save_model(load_policy(tied, tokenizer), tokenizer, tmp_path / "base", card="")
        config = LoraConfig(r=2, target_modules=targets, ensure_weight_tying=tying, task_type="CAUSAL_LM")
        model = _moved(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)).eval()
        model.save_pretrained(tmp_path / "adapter")
        settings = ModelSettings(source=str(tmp_path / "adapter"))
        if refused is not None:
            with pytest.raises(InputError, match=refused):
                load_policy(settings, tokenizer)
            return
        found = load_policy(settings, tokenizer).eval()
        expected = completion_logprobs(model, GROUPS, temperature=1.0)
        assert torch.allclose(completion_logprobs(found, GROUPS, temperature=1.0), expected, atol=1e-4)

    def test_of_a_reward_model_scores(self, tmp_path: Path, tokenizer) -> None:
        save_model(load_policy(ModelSettings(config=LLAMA), tokenizer), tokenizer, tmp_path / "base", card="")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        model = _moved(get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))).eval()
        model.save_pretrained(tmp_path / "adapter")
        found = load_scoring_model(str(tmp_path / "adapter"), tokenizer, num_labels=1).eval()
        assert torch.allclose(completion_outputs(found, GROUPS), completion_outputs(model, GROUPS), atol=1e-5)


def test_half_precision_is_refused_before_anything_is_loaded() -> None:
    check_trainable(ModelSettings(source="x"), "model", head=False)
    adapters = ModelSettings(source="x", dtype="float16", lora=LoraSettings())
    check_trainable(adapters, "model", head=False)
    with pytest.raises(InputError, match=r"reward.model.dtype = float16: .* float32 \(precision may be bf16\)\.$"):
        check_trainable(adapters, "reward.model", head=True)
    with pytest.raises(InputError, match=r"model.dtype = float16: .* or train LoRA adapters"):
        check_trainable(ModelSettings(source="x", dtype="float16"), "model", head=False)


def test_a_model_whose_files_do_not_agree_is_one_sentence(tmp_path: Path, tokenizer, caplog) -> None:
    save_model(load_policy(ModelSettings(config=LLAMA), tokenizer), tokenizer, tmp_path / "m", card="")
    (tmp_path / "m" / "SHA256SUMS").unlink()
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text())
    for changed, message in (
        ({"intermediate_size": 32}, r"m: model.layers.0.mlp.down_proj.weight has the shape \(16, 24\), .* \(16, 32\)"),
        ({"_attn_implementation": "flash_attention_2"}, r"Cannot load the model"),
        ({"pad_token_id": 10**6}, r"Cannot load the model"),
    ):
        path.write_text(json.dumps(values | changed))
        with pytest.raises(InputError, match=message):
            load_policy(ModelSettings(source=str(tmp_path / "m")), tokenizer)
    path.write_text(json.dumps(values | {"num_hidden_layers": 1}))
    load_policy(ModelSettings(source=str(tmp_path / "m")), tokenizer)
    assert "9 weights are not used, as model.layers.1." in caplog.text
    path.write_text(json.dumps(values | {"num_hidden_layers": "two"}))
    with pytest.raises(InputError, match="num_hidden_layers"):
        load_policy(ModelSettings(source=str(tmp_path / "m")), tokenizer)


def test_transformers_alone_stops_where_the_chat_template_ends_answers(tmp_path: Path, tokenizer) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <|turn|> \n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    model = load_policy(ModelSettings(config=CONFIG), tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|turn|>")
    save_model(model, tokenizer, tmp_path / "chat", card="")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "chat").eval()
    assert plain.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
    plain.lm_head.weight = nn.Parameter(torch.zeros_like(plain.lm_head.weight))
    plain.lm_head.bias = nn.Parameter(torch.eye(len(tokenizer))[end])  # whatever is asked, the turn ends
    assert plain.generate(torch.tensor([[3, 4]]), max_new_tokens=9, do_sample=False)[0].tolist() == [3, 4, end]
    again = load_policy(ModelSettings(source=str(tmp_path / "chat")), tokenizer)
    assert again.generation_config.eos_token_id == [tokenizer.eos_token_id, end]  # nothing twice


def test_the_tokenizer_files_that_openai_published_are_a_tokenizer(tmp_path: Path) -> None:
    core = Tokenizer(tokenizer_models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["the film was the best of the films"], trainer)
    core.model.save(str(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    loaded = load_tokenizer(str(tmp_path))
    text = " the film, best é\n"
    assert loaded(text)["input_ids"] == core.encode(text).ids and loaded.decode(core.encode(text).ids) == text
    assert loaded.eos_token == "<|endoftext|>"
