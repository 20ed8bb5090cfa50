"""Tiny sequence classifiers with random weights, and tokenizers of a few words."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from exalign.data.record import Completion, Record

WORDS = 30
_HEADS = {"vocab_size": WORDS + 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "eos_token_id": 0, "bos_token_id": 0},
    "llama": {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": 0},
    "bert": {"intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 1},
    "roberta": {"intermediate_size": 24, "max_position_embeddings": 34, "pad_token_id": 1},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32},
}


def tiny_classifier(model_type: str, num_labels: int):
    torch.manual_seed(0)
    base = {} if model_type in ("gpt2", "distilbert") else _HEADS
    values = {"vocab_size": WORDS + 4, **base, **CONFIGS[model_type], "pad_token_id": 1, "num_labels": num_labels}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **values)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.5)
    return model


def word_tokenizer(*, encoder: bool, reverse: bool = False) -> PreTrainedTokenizerFast:
    """`</s>` 0, `<pad>` 1, `<s>` 2, `<unk>` 3, then the words w0…; `reverse` numbers the words the other way round."""
    order = reversed(range(WORDS)) if reverse else range(WORDS)
    vocabulary = {"</s>": 0, "<pad>": 1, "<s>": 2, "<unk>": 3, **{f"w{word}": 4 + i for i, word in enumerate(order)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if encoder:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def word_records() -> list[Record]:
    """Ragged prompts and completions; the second record was sampled with another model's ids."""

    def words(first: int, number: int) -> str:
        return " ".join(f"w{(first + 7 * i) % WORDS}" for i in range(number))

    return [
        Record("a", words(1, 3), (Completion(" " + words(2, 4)), Completion(" " + words(5, 1)))),
        Record(
            "b",
            words(8, 9),
            (Completion(" " + words(3, 6), token_ids=(9, 9), finish_reason="length", logprob=-1.0),),
            prompt_ids=(9, 9, 9),
        ),
        Record("c", words(4, 1), tuple(Completion(" " + words(i, 2 + i)) for i in range(4))),
    ]


@pytest.fixture
def make_classifier():
    return tiny_classifier


@pytest.fixture
def make_tokenizer():
    return word_tokenizer


@pytest.fixture
def records() -> list[Record]:
    return word_records()
