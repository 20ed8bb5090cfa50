"""Language models as judges: one served by `transformers serve` over HTTP, and the same one loaded in this process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from exalign.errors import InputError
from exalign.judging.comparisons import read_comparisons

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}judge: "
OPTIONS = ("--max-answer-tokens", 6, "--timeout", 30, "--concurrency", 2)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A random Llama of 20,000 weights with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny-judge"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Verdict: A", "Verdict: B", "answer request"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(model_folder, wait_until) -> Iterator[str]:
    """The address of `transformers serve` with that model."""
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi (pip install 'transformers[serving]')")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", str(model_folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("transformers")), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: httpx.get(f"{address}/health", timeout=5).status_code == 200, process)
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def run(make_run) -> Path:
    prompts = {str(i): f"Question {i}" for i in range(3)}
    return make_run("demo", prompts, {}, sft=dict.fromkeys(prompts, ("one",)), exo=dict.fromkeys(prompts, ("two",)))


def assert_unreadable(result) -> None:
    """The judge asked everything and answered: six tokens of random weights, in which there is no verdict."""
    assert isinstance(result.exception, InputError), (result.output, result.exception)
    assert "no pair has a readable verdict" in str(result.exception)


def answers(folder: Path) -> dict[tuple[str, str | None], str | None]:
    return {(c.prompt_id, c.left): c.answer for c in read_comparisons(folder / "comparisons.jsonl")}


def test_a_served_model_and_the_same_model_in_this_process_say_the_same(run, served, model_folder, invoke):
    arguments = ("judge", run, "--against", "sft", *OPTIONS)
    remote = invoke(*arguments, "--endpoint", f"{served}/v1", "--model", model_folder)
    assert_unreadable(remote)
    local = invoke(*arguments, "--model-path", model_folder)
    assert_unreadable(local)
    here = run / "judging" / "llm" / "tiny-judge-instruction" / "exo-vs-sft"
    (there,) = [path.parent for path in run.rglob("comparisons.jsonl") if path.parent != here]
    # Six greedy answers of random weights: the same text, and nothing that could be read as a verdict.
    assert len(answers(here)) == 6
    assert answers(here) == answers(there)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (here, there)]
    for summary in summaries:
        assert (summary["unreadable_pairs"], summary["win"], summary["length_controlled"]) == (3, None, None)
        assert summary["tokens"]["completion"] == 6 * 6
    assert summaries[0]["tokens"]["prompt"] == summaries[1]["tokens"]["prompt"]


def test_a_served_model_behind_a_faulty_proxy(run, served, model_folder, running, invoke):
    arguments = ("judge", run, "--against", "sft", *OPTIONS)
    assert_unreadable(invoke(*arguments, "--model-path", model_folder))
    patient = ("--timeout", 3, "--retry-wait", 0.01)
    with running("faults", UPSTREAM=served, SLOW="60") as proxy:
        result = invoke(*arguments, "--endpoint", f"{proxy}/v1", "--model", model_folder, *patient)
        injected = sum(httpx.get(f"{proxy}/counts").json()["injected"].values())
    assert_unreadable(result)
    assert injected == 12
    here = run / "judging" / "llm" / "tiny-judge-instruction" / "exo-vs-sft"
    (there,) = [path.parent for path in run.rglob("comparisons.jsonl") if path.parent != here]
    assert answers(there) == answers(here)
    outcomes = [json.loads(line)["outcome"] for line in (there / "exchanges.jsonl").read_text().splitlines()]
    assert outcomes.count("answered") == 6


def test_a_local_model_is_known_by_its_weights(run, model_folder, invoke):
    arguments = ("judge", run, "--against", "sft", *OPTIONS, "--model-path", model_folder)
    folder = run / "judging" / "llm" / "tiny-judge-instruction" / "exo-vs-sft"
    assert_unreadable(invoke(*arguments, "--prompts", 1))
    assert_unreadable(invoke(*arguments, "--prompts", 1))
    assert len((folder / "exchanges.jsonl").read_text().splitlines()) == 2
    weights = model_folder / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + b"\x00\x00\x00\x3f")
        assert_unreadable(invoke(*arguments, "--prompts", 1))
    finally:
        weights.write_bytes(before)
    assert len((folder / "exchanges.jsonl").read_text().splitlines()) == 4


def test_a_sampled_answer_is_a_function_of_its_question(run, model_folder, invoke):
    folder = run / "judging" / "llm" / "tiny-judge-instruction" / "exo-vs-sft"
    arguments = ("judge", run, "--against", "sft", *OPTIONS, "--model-path", model_folder, "--temperature", 1.5)
    invoke(*arguments)
    first = answers(folder)
    (folder / "exchanges.jsonl").unlink()
    invoke(*arguments, "--prompts", 2)
    assert len(set(first.values())) > 1
    assert answers(folder).items() <= first.items()
