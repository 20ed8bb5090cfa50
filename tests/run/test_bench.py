"""`exalign bench`: what it counts, and that it measures what it says."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from exalign.errors import InputError
from exalign.models.model_settings import ModelSettings
from exalign.run.bench import BenchShape, Rate, bench, bench_table, measure_training

CONFIG = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
SHAPE = BenchShape(prompts=3, num_completions=2, prompt_tokens=9, completion_tokens=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    return str(folder)


def test_a_model_from_a_config_is_measured(tokenizer: str) -> None:
    settings = ModelSettings(config=CONFIG)
    peak, (*training, sampling, rounded) = bench(settings, SHAPE, tokenizer=tokenizer, budgets=(20, 99))
    assert peak > 0 and [rate.what for rate in training] == ["training, token_budget 20", "training, token_budget 99"]
    for rate in training:
        assert rate.tokens == 3 * (9 + 2 * 4)
        assert 0 < rate.seconds < 60
    # every completion has at least one token, and at most four; each is drawn once
    assert 3 * 2 <= sampling.tokens <= 3 * 2 * 4
    assert sampling.flops < training[0].flops
    assert rounded.what.endswith("precision bf16") and 3 * 2 <= rounded.tokens <= 3 * 2 * 4


def test_the_table_shows_rates_and_shares_as_quotients() -> None:
    rates = [Rate("token_budget 1024", 2.0, 200, 2e9), Rate("sampling", 1.0, 10, 1e8)]
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(bench_table(SHAPE, 2e9, rates))
    lines = console.export_text().splitlines()
    assert any("50%" in line and " 100 " in line for line in lines if "token_budget" in line)
    assert any("sampling" in line and "5%" in line for line in lines) and any("2 GFLOP/s" in line for line in lines)


def test_what_cannot_be_measured_is_one_sentence(tokenizer: str) -> None:
    too_long = SHAPE.model_copy(update={"prompt_tokens": 29})
    with pytest.raises(InputError, match="32 positions"):
        bench(ModelSettings(config=CONFIG), too_long, tokenizer=tokenizer)


def test_the_steps_that_are_timed_are_training_steps(tokenizer: str) -> None:
    from exalign.models.loading import load_policy, load_tokenizer

    torch.manual_seed(0)
    model = load_policy(ModelSettings(config=CONFIG), load_tokenizer(tokenizer))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    measure_training(model, SHAPE)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(parameter.grad is None for parameter in model.parameters())
