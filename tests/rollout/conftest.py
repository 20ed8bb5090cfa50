"""Tiny models of several architectures with random weights, and a tokenizer of a few words."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 23
EOS = 0
_SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "bos_token_id": EOS, "eos_token_id": EOS}
_LLAMA = {
    **_SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": EOS,
}
CONFIGS = {
    "gpt2": {**_SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {
        **_SMALL,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 6},
    "gemma": _LLAMA,
    "gemma2": {**_LLAMA, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_LLAMA, "sliding_window": 6, "query_pre_attn_scalar": 8, "num_hidden_layers": 7},
}


def tiny_model(model_type: str, *, dtype: torch.dtype = torch.float64, scale: float = 1.0, **changes):
    """A model whose weights are spread enough (`scale`) for its distributions to be far from uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**CONFIGS.get(model_type, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, scale * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"</s>": EOS, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="</s>")


@pytest.fixture
def make_model():
    return tiny_model
