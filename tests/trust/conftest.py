"""A run of seconds without any network interface, in a process whose attempts to reach one are written down."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from exalign.data.synthetic import write_world

CANARY = "sk-c4n4ry/7d81e0b2a95f"
SECRETS = {
    name: f"{CANARY}-{name.lower()}"
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD")
}
PROGRAM = """
import os, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(os.environ["ATTEMPTS"], "a") as stream:
            stream.write(f"{event} {arguments!r}\\n")
sys.addaudithook(note)
from exalign.cli import main
main(sys.argv[1:])
"""
TINY = (
    "model.config={model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 96}",
    "sft={learning_rate: 3e-3, epochs: 1, batch_prompts: 16}",
    "reward=null",
    "preferences=null",
    "score.scorer={function: 'exalign.data.synthetic:reward'}",
    "align={exo-rw: {learning_rate: 1e-3, batch_prompts: 4, beta_pi: 0.5}}",
    "sample={num_completions: 2, max_new_tokens: 4}",
    "evaluate={scorer: {function: 'exalign.data.synthetic:reward'}, prompts: 4, samples: 1, pool_prompts: 0}",
)


@dataclass(frozen=True)
class Isolated:
    """A finished run, what it printed, and the network events of its process."""

    folder: Path
    printed: str
    attempts: str


@pytest.fixture(scope="session")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Isolated:
    """`exalign run` on a world of a few rows, in a network namespace that holds no interface, with secrets around."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not permit network namespaces (unshare -rn)")
    from exalign.run.demo import RECIPE

    home = tmp_path_factory.mktemp("isolated")
    write_world(home / "world", num_sft=32, num_prompts=8, num_test=4)
    places = {"tokenizer.source": "tokenizer", "data.sft.source": "sft.jsonl", "data.prompts.source": "prompts.jsonl"}
    places["data.evaluation.source"] = "test.jsonl"
    overrides = [f"{key}={home / 'world' / name}" for key, name in places.items()]
    program = [sys.executable, "-c", PROGRAM, "run", str(RECIPE), "--run", str(home / "run"), *overrides, *TINY]
    kept = {name: value for name, value in os.environ.items() if "OFFLINE" not in name and "TELEMETRY" not in name}
    environment = {**kept, **SECRETS, "HF_HOME": str(home / "hub"), "ATTEMPTS": str(home / "attempts")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        ["unshare", "-rn", *program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    attempts = home / "attempts"
    return Isolated(home / "run", done.stdout + done.stderr, attempts.read_text() if attempts.exists() else "")
