"""Every causal language model of transformers, tiny and at random: trained on and sampled from as its own rows say.

An architecture that cannot take a fast way takes a slower one; what is no causal language model is one sentence.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from exalign.data.batching import Group
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.models.capability import check_positions
from exalign.models.logprobs import completion_logprobs
from exalign.rollout.sampler import GroupedSampler, PlainDecoder
from exalign.rollout.settings import SampleSettings

VOCABULARY, POSITIONS, TAU = 23, 64, 0.8
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "lru_width", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "mamba_n_heads", "linear_num_value_heads", "num_codebooks"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "state_size"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_k", "moe_topk", "linear_num_key_heads"), 2),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "ffn_hidden_size", "dim_ff", "dff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "rotary_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 6),
    **{"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "mamba_d_head": 16, "mamba_d_state": 4},
}
VARIANTS: tuple[dict[str, object], ...] = ({}, {"num_key_value_heads": 4}, {"pad_token_id": 0, "is_decoder": True})
NO_NEXT_TOKEN = {
    *("bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta"),
    *("xlm-roberta-xl", "xlnet", "xmod", "reformer"),
}


def tiny(model_type: str, **changes: object) -> nn.Module:
    default = AutoConfig.for_model(model_type)
    values = {key: value for key, value in SMALL.items() if hasattr(default, key)}
    config = AutoConfig.for_model(model_type, **(values | changes))
    with torch.device("meta"):
        if sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters()) > 4e6:
            pytest.skip("its parts have sizes of their own")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
        assert model(input_ids=torch.arange(9)[None], use_cache=False).logits.shape == (1, 9, VOCABULARY)
    return model


def buildable(model_type: str) -> nn.Module:
    for changes in VARIANTS:
        try:
            return tiny(model_type, **changes)
        except Exception as error:  # whatever its config wants of sizes that fit each other
            reason = error
    pytest.skip(f"no tiny one: {str(reason)[:80]}")


def alone(model: nn.Module, group: Group) -> Tensor:
    """log π(y_i|x) of each completion, one row at a time."""
    found = []
    for ids in group.completion_ids:
        row = torch.cat([group.prompt_ids, ids])[None]
        with torch.no_grad():
            logps = (model(input_ids=row, use_cache=False).logits[0, :-1].float() / TAU).log_softmax(-1)
        found.append(logps.gather(1, row[0, 1:, None])[len(group.prompt_ids) - 1 :].sum())
    return torch.stack(found)


def check(model: nn.Module, tokenizer) -> GroupedSampler:
    draw = torch.Generator().manual_seed(1)
    groups = [
        Group(
            i,
            torch.randint(1, VOCABULARY, (prompt,), generator=draw),
            tuple(torch.randint(1, VOCABULARY, (length,), generator=draw) for length in lengths),
        )
        for i, (prompt, lengths) in enumerate([(7, [3, 9, 1]), (1, [4]), (12, [2, 5])])
    ]
    logp = completion_logprobs(model, groups, temperature=TAU)
    logp.sum().backward()
    for group, row in zip(groups, logp.detach(), strict=True):
        torch.testing.assert_close(row[: group.num_completions], alone(model, group), atol=1e-3, rtol=0)
    settings = SampleSettings(num_completions=3, max_new_tokens=10, max_prompt_tokens=20, batch_completions=7)
    sampler = GroupedSampler(model, tokenizer, settings, temperature=TAU, seed=0)
    records = [Record(f"p{i}", " ".join(f"w{1 + (i * 5 + j) % 22}" for j in range(1 + 3 * i % 11))) for i in range(4)]
    for record in sampler.sample(records):
        group = Group(0, torch.tensor(record.prompt_ids), tuple(torch.tensor(c.token_ids) for c in record.completions))
        recorded = torch.tensor([c.logprob for c in record.completions])
        torch.testing.assert_close(recorded, alone(model, group), atol=1e-3, rtol=0)
    return sampler


@pytest.mark.large
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_trained_and_sampled_as_its_own_rows_say(model_type, tokenizer) -> None:
    model = buildable(model_type)
    if model_type in NO_NEXT_TOKEN and not getattr(model.config, "is_decoder", False):
        with pytest.raises(InputError, match="reads the tokens that follow"):
            check(model, tokenizer)
        return
    check(model, tokenizer)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit == POSITIONS:
        ids = torch.arange(POSITIONS + 3)[None] % VOCABULARY
        try:
            check_positions(model.config, POSITIONS + 3, settings="", samples=False)
        except InputError:
            return
        with torch.no_grad():  # what is not refused can be computed
            model(input_ids=ids, use_cache=False)


def test_a_model_that_names_no_body_takes_its_own_forward(tokenizer) -> None:
    model = tiny("llama4_text", attention_chunk_size=8)
    assert isinstance(check(model, tokenizer)._decoder, PlainDecoder)


def test_a_model_that_keeps_its_state_in_itself_is_sampled_by_whole_texts(tokenizer, caplog) -> None:
    model = tiny("recurrent_gemma", block_types=["recurrent", "attention"])
    decoder = check(model, tokenizer)._decoder
    assert isinstance(decoder, PlainDecoder)
    assert not decoder._cached
    assert "by reading whole texts for each token" in caplog.text


@pytest.mark.parametrize("model_type", ["bert", "cpmant"])
def test_a_model_that_reads_what_follows_is_one_sentence(model_type, tokenizer) -> None:
    said = r"^(BertLMHeadModel|CpmAntForCausalLM) reads the tokens that follow as well, so it gives no probability"
    pair = torch.ones(2, dtype=torch.long)
    with pytest.raises(InputError, match=said):
        completion_logprobs(tiny(model_type), [Group(0, pair, (pair,))], temperature=1.0)
    settings = SampleSettings(max_prompt_tokens=4, max_new_tokens=4)
    with pytest.raises(InputError, match=said):
        GroupedSampler(tiny(model_type), tokenizer, settings, temperature=1.0, seed=0)
