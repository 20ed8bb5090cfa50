"""Servers, run directories and a command line for the judge's tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

from exalign.data.record import Completion, Prompt, Record
from exalign.data.store import Header, write_records
from exalign.judging.judge import grade_judge, judge

HERE = Path(__file__).parent


@contextmanager
def serve(app: str, **environment: str) -> Iterator[str]:
    """`app` of servers.py on a free port of loopback, in a process of its own; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        command = [sys.executable, "-m", "uvicorn", "--factory", f"servers:{app}", "--app-dir", str(HERE)]
        process = subprocess.Popen(
            [*command, "--fd", str(listener.fileno()), "--log-level", "critical"],
            pass_fds=[listener.fileno()],
            env={**os.environ, **environment},
            stderr=subprocess.DEVNULL,
        )
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            wait(lambda: httpx.get(f"{address}/counts", timeout=30).status_code == 200, process)
            yield address
        finally:
            process.kill()
            process.wait()


def wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], *, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the process ended early"
        try:
            if ready():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise TimeoutError("not ready in time")


@pytest.fixture(scope="session")
def running() -> Callable[..., AbstractContextManager[str]]:
    return serve


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    return wait


@pytest.fixture(scope="session")
def rules() -> Iterator[str]:
    """The address of a server that judges by rule."""
    with serve("rules") as address:
        yield address


Answers = Mapping[str, tuple[str, ...]]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run directory: prompts with reference texts, and the answers of each policy (by method, last step 20)."""

    def make(name: str, prompts: Mapping[str, Prompt], references: Mapping[str, str], **policies: Answers) -> Path:
        run = tmp_path / name
        evaluation = run / "evaluation"

        def write(folder: Path, answers: Answers) -> None:
            rows = [
                Record(key, prompt, tuple(Completion(text) for text in answers.get(key, ())))
                for key, prompt in prompts.items()
            ]
            write_records(folder, rows, Header())

        write(evaluation / "prompts", {key: (text,) for key, text in references.items()})
        for policy, answers in policies.items():
            if policy == "sft":
                write(evaluation / "sft" / "samples", answers)
            else:
                early = dict.fromkeys(prompts, ("early",))
                write(evaluation / policy / "step-000005" / "samples", early)
                write(evaluation / policy / "step-000020" / "samples", answers)
        return run

    return make


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Run `judge …` or `grade-judge …`; without a key unless the environment is given."""
    app = typer.Typer()
    app.command("judge")(judge)
    app.command("grade-judge")(grade_judge)

    def call(*arguments: object, env: Mapping[str, str | None] | None = None) -> Result:
        environment = {"COLUMNS": "200", "OPENAI_API_KEY": None, **(env or {})}
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)

    return call
