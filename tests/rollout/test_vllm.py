"""The sampler on vLLM, as far as it can be checked without a GPU: what the engine is asked for, and what is made of it.

No engine runs here and none is imitated: outputs are plain values of the documented shape.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from exalign.data.record import Record
from exalign.errors import InputError
from exalign.rollout.sampler import saved_end_ids
from exalign.rollout.settings import SampleSettings, VLLMSettings
from exalign.rollout.vllm import VLLMSampler, completions_of, engine_arguments, prompt_seed, sampling_arguments

EOS = 0
PROMPT = Record("a", "", prompt_ids=(1,))
TWO = SampleSettings(num_completions=2, max_new_tokens=3, max_prompt_tokens=10)


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class Output:
    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, Logprob]] | None
    finish_reason: str | None


def output(index: int, ids: list[int], reason: str | None, more: int | None = None) -> Output:
    """Token number t has −(t + 1) / 4 nats; `more` is another token that the engine reports beside each."""
    rows = [{token: Logprob(-(t + 1) / 4)} | ({more: Logprob(-9.0)} if more else {}) for t, token in enumerate(ids)]
    return Output(index, ids, rows, reason)


def test_completions_keep_the_drawn_ids_and_the_sum_of_their_own_logprobs(tokenizer) -> None:
    found = completions_of(PROMPT, [output(1, [5, 6, 7], "length", more=3), output(0, [4, EOS], "stop")], TWO, {EOS},
                           tokenizer)  # fmt: skip
    assert [c.token_ids for c in found] == [(4, EOS), (5, 6, 7)]
    assert [c.text for c in found] == [" w4", " w5 w6 w7"]
    assert [c.finish_reason for c in found] == ["stop", "length"]
    assert [c.logprob for c in found] == [-0.25 - 0.5, -0.25 - 0.5 - 0.75]


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([output(0, [4, EOS], "stop")], "vLLM gave 1 completions for a, not 2"),
        ([output(0, [4, EOS], "stop"), output(0, [4, EOS], "stop")], "vLLM gave 2 completions for a, not 2"),
        ([output(0, [4, EOS], "stop"), Output(1, [4, EOS], None, "stop")], "2 tokens but 0 log-probabilities"),
        ([output(0, [4, EOS], "stop"), Output(1, [], [], "abort")], "0 tokens but 0 log-probabilities"),
        ([output(0, [4, EOS], "stop"), output(1, [4, 5], "stop")], "ended by 'stop', but its 2 tokens say 'length'"),
        ([output(0, [4, EOS], "stop"), output(1, [4, 5], "length")], "cannot be trusted"),
        ([output(0, [4, EOS], "stop"), output(1, [4, 5, 6], "abort")], "ended by 'abort'"),
    ],
)
def test_what_does_not_fit_together_is_refused(outputs: list[Output], said: str, tokenizer) -> None:
    with pytest.raises(InputError, match=said):
        completions_of(PROMPT, outputs, TWO, {EOS}, tokenizer)


def test_the_engine_is_asked_for_the_distribution_that_the_record_speaks_of() -> None:
    asked = sampling_arguments(SampleSettings(num_completions=4, max_new_tokens=7, top_p=0.9, top_k=5), 0.8, 11, [0, 2])
    assert (asked["n"], asked["max_tokens"], asked["temperature"]) == (4, 7, 0.8)
    assert (asked["top_p"], asked["top_k"], asked["seed"], asked["stop_token_ids"]) == (0.9, 5, 11, [0, 2])
    assert asked["logprobs"] == 0 and asked["detokenize"] is False
    whole = sampling_arguments(SampleSettings(), 1.0, 0, [0])
    assert (whole["top_p"], whole["top_k"]) == (1.0, 0)
    engine = engine_arguments(VLLMSettings(memory_share=0.5), TWO, dtype="bfloat16", gpus=2)
    assert engine["logprobs_mode"] == "processed_logprobs"
    assert (engine["max_model_len"], engine["tensor_parallel_size"], engine["dtype"]) == (13, 2, "bfloat16")
    assert (engine["gpu_memory_utilization"], engine["load_format"], engine["trust_remote_code"]) == (
        0.5,
        "safetensors",
        False,
    )


def test_a_prompt_has_its_own_seed_and_room_for_its_completions() -> None:
    expected = int.from_bytes(hashlib.sha256(b"3\0train.jsonl:7").digest()[:8], "little") // 4
    assert prompt_seed(3, "train.jsonl:7") == expected
    seeds = [prompt_seed(0, str(i)) for i in range(1000)]
    assert max(seeds) + 128 < 2**63
    assert min(abs(a - b) for a, b in zip(sorted(seeds), sorted(seeds)[1:], strict=False)) > 128


def test_the_ids_that_end_a_completion_are_the_tokenizer_s_and_the_model_s(tmp_path: Path, tokenizer) -> None:
    assert saved_end_ids(tmp_path, tokenizer) == {EOS}
    for given, expected in ((7, {EOS, 7}), ([7, 9], {EOS, 7, 9}), (None, {EOS})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        assert saved_end_ids(tmp_path, tokenizer) == expected


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_one_sentence_says_what_to_install(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(InputError, match=r'pip install "exalign\[vllm\]"'):
        VLLMSampler(tmp_path, tokenizer, TWO, engine={}, temperature=1.0, seed=0)
