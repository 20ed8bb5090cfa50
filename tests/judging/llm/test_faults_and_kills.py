"""What a bad network, a bad server and a kill may do to a judge: delay it. Nothing is lost, doubled or guessed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from exalign.errors import InputError

PROMPTS = {str(i): f"Question {i}" for i in range(16)}
FAST = ("--retry-wait", 0.01)
FOLDER = Path("judging/llm/good-instruction/exo-vs-sft")


@pytest.fixture
def run(make_run) -> Path:
    exo = {key: (f"good answer {key}" if int(key) % 4 else f"poor answer {key}",) for key in PROMPTS}
    return make_run("demo", PROMPTS, {}, sft={key: (f"a good answer {key}",) for key in PROMPTS}, exo=exo)


def exchanges(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "exchanges.jsonl").read_text().splitlines()]


def test_every_pair_is_answered_once_through_a_faulty_proxy(run, rules, running, invoke):
    with running("faults", UPSTREAM=rules) as proxy:
        options = (*FAST, "--timeout", 1, "--attempts", 4, "--concurrency", 8)
        result = invoke("judge", run, "--against", "sft", "--endpoint", f"{proxy}/v1", "--model", "good", *options)
        assert result.exit_code == 0, result.output
        counts = httpx.get(f"{proxy}/counts").json()
    assert set(counts["injected"]) >= {"429", "500", "slow", "cut-off", "malformed", "wrong-shape", "hang-up"}
    assert counts["attempts"] == [3] * 32
    rows = exchanges(run / FOLDER)
    answered = Counter(row["key"] for row in rows if row["outcome"] == "answered")
    assert len(answered) == 32
    assert set(answered.values()) == {1}
    failed = Counter(row["key"] for row in rows if row["outcome"] == "again")
    assert failed == dict.fromkeys(answered, 2)
    summary = json.loads((run / FOLDER / "summary.json").read_text())
    # By rule: the poor answers lose to "a good answer", the good ones are as good.
    assert (summary["lose"]["estimate"], summary["tie"]["estimate"]) == (0.25, 0.75)
    assert (summary["unanswered"], summary["unreadable_pairs"], summary["asking"]["attempts_failed"]) == (0, 0, 64)


def retry_after_was_honoured(rows: list[dict]) -> bool:
    """Between a 429 that asks for 0.2 s and the next attempt at the same question lies at least that."""
    waits = []
    for i, row in enumerate(rows):
        if row["http_status"] == 429 and isinstance(json.loads(row["response"])["error"], dict):
            later = next(other for other in rows[i + 1 :] if other["key"] == row["key"])
            waits.append(stored_at(later) - later["seconds"] - stored_at(row))
    return len(waits) > 0 and min(waits) >= 0.2 - 0.01


def stored_at(row: dict) -> float:
    return datetime.fromisoformat(row["time"]).timestamp()


def test_a_killed_judge_continues_where_it_was(run, running):
    with running("rules", DELAY="0.15") as server:
        program = "from exalign.judging.judge import judge; import typer; typer.run(judge)"
        command = [sys.executable, "-c", program, str(run), "--against", "sft", "--concurrency", "3"]
        command += ["--endpoint", f"{server}/v1", "--model", "good"]
        environment = {**os.environ, "OPENAI_API_KEY": ""}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        wait_for_lines(run / FOLDER / "exchanges.jsonl", 11, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / FOLDER / "summary.json").exists()
        tear(run / FOLDER / "exchanges.jsonl")
        kept = complete_rows(run / FOLDER / "exchanges.jsonl")
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        served = httpx.get(f"{server}/counts").json()["served"]
    rows = exchanges(run / FOLDER)
    assert rows[: len(kept)] == kept
    assert Counter(Counter(row["key"] for row in rows).values()) == {1: 32}
    # What was under way at the kill, at most one per worker, was answered to nobody; nothing else was asked twice.
    assert len(served) == 32
    assert sum(served) <= 32 + 3
    assert json.loads((run / FOLDER / "summary.json").read_text())["lose"]["estimate"] == 0.25


def wait_for_lines(path: Path, wanted: int, process: subprocess.Popen[bytes]) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < wanted:
        assert process.poll() is None, "the judge ended before it could be killed"
        time.sleep(0.01)


def complete_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def tear(path: Path) -> None:
    """What a write that was under way leaves behind."""
    with path.open("ab") as stream:
        stream.write(b'{"version": 1, "key": "0123", "outcome": "answered", "resp')


def test_a_request_that_is_refused_is_left_for_later_and_counted(make_run, rules, invoke):
    prompts = {"0": "Question", "1": "too-long question"}
    run = make_run("demo", prompts, {}, sft=dict.fromkeys(prompts, ("a",)), exo=dict.fromkeys(prompts, ("good",)))
    arguments = ("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "2 questions got no answer" in result.output
    summary = json.loads((run / FOLDER / "summary.json").read_text())
    assert (summary["pairs"], summary["unanswered"], summary["win"]["num_prompts"]) == (2, 1, 1)
    refused = [row for row in exchanges(run / FOLDER) if row["outcome"] == "refused"]
    assert [row["http_status"] for row in refused] == [400, 400]  # once for each order: no attempt is repeated


def test_many_refused_requests_keep_no_other_from_being_asked(make_run, rules, invoke):
    prompts = {str(n): "Question" if n in (0, 19) else "too-long question" for n in range(20)}
    run = make_run("demo", prompts, {}, sft=dict.fromkeys(prompts, ("a",)), exo=dict.fromkeys(prompts, ("good",)))
    arguments = ("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    invoke(*arguments)
    assert invoke(*arguments).exit_code == 1  # what was answered is known: the rest was refused, and nothing is down
    summary = json.loads((run / FOLDER / "summary.json").read_text())
    assert (summary["unanswered"], summary["win"]["num_prompts"]) == (18, 2)


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk-one two", "sk-one\N{HORIZONTAL ELLIPSIS}"])
def test_a_key_that_no_request_can_carry_is_refused_unseen(run, rules, invoke, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    options = ("--endpoint", f"{rules}/v1", "--model", "good", "--key-variable", "MY_KEY", *FAST)
    result = invoke("judge", run, "--against", "sft", *options)
    assert isinstance(result.exception, InputError) and "The key in MY_KEY has a line break" in str(result.exception)
    assert "sk-" not in result.output + str(result.exception) and not (run / "judging").exists()


def test_a_dead_endpoint_is_given_up(run, invoke):
    options = (*FAST, "--attempts", 2, "--concurrency", 4, "--away-wait", 0)
    result = invoke("judge", run, "--against", "sft", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m", *options)
    assert isinstance(result.exception, InputError)
    assert "10 questions in a row got no answer" in str(result.exception)
    folder = run / "judging/llm/m-instruction/exo-vs-sft"
    assert len({row["key"] for row in exchanges(folder)}) <= 10 + 3


def test_the_key_is_sent_but_never_stored_or_printed(run, rules, invoke):
    key = "sk-very-secret-0123456789"
    arguments = ("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", *FAST)
    result = invoke(*arguments, "--model", "key-echo", env={"OPENAI_API_KEY": key})
    # The server repeats the key in its message of refusal.
    assert "[key]" in str(result.exception)
    assert key not in str(result.exception)
    other_key = f"{key}-2"
    result = invoke(*arguments, "--model", "good", "--key-variable", "MY_KEY", env={"MY_KEY": other_key})
    assert result.exit_code == 0
    assert httpx.get(f"{rules}/counts").json()["keys"][f"Bearer {other_key}"] == 32
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert key.encode() not in written
    assert key not in result.output


def test_a_key_does_not_travel_unencrypted_by_default(run, invoke):
    arguments = ("judge", run, "--against", "sft", "--endpoint", "http://judge.example/v1", "--model", "m", "--dry-run")
    result = invoke(*arguments, env={"OPENAI_API_KEY": "sk-1"})
    assert "not encrypted" in str(result.exception)
    assert invoke(*arguments, "--key-variable", "MY_KEY", env={"MY_KEY": "sk-1"}).exit_code == 0
    assert invoke(*arguments).exit_code == 0
