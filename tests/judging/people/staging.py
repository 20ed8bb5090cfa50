"""A run folder with made-up evaluation samples, and the assessment server as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from exalign.data.record import Completion, Record
from exalign.data.store import Header, write_records

COMMAND = [sys.executable, "-c", "from exalign.judging.assess import app; app()"]
MATCHES = [("exo", "dpo"), ("exo", "ppo"), ("exo", "sft")]


def write_run(folder: Path, num_prompts: int, answer: Callable[[str, int], str] | None = None) -> Path:
    """Evaluation samples of sft, exo (two steps), dpo and ppo, and reference texts, in a run folder's layout."""
    answer = answer or (lambda system, i: f"{system} answers prompt {i}.")
    header = Header()

    def write(place: str, system: str, samples: int = 1) -> None:
        records = [
            Record(
                id=f"p{i}",
                prompt=({"role": "user", "content": f"Question {i}?"},),
                completions=tuple(
                    Completion(answer(system, i) if k == 0 else f"{system} again ({k})") for k in range(samples)
                ),
            )
            for i in range(num_prompts)
        ]
        write_records(folder / "evaluation" / place, records, header)

    write("prompts", "reference")
    write("sft/samples", "sft", samples=2)
    write("exo/step-000010/samples", "exo-early")
    for method in ("exo", "dpo", "ppo"):
        write(f"{method}/step-000020/samples", method, samples=2)
    return folder


class Server:
    """`exalign assess serve` as a process; `kill` ends it without a chance to tidy up."""

    def __init__(self, store: str, log: Path | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.store, self.log = store, log or Path(os.devnull)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [*COMMAND, "serve", self.store, "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.url, timeout=5)
            except urllib.error.HTTPError:
                return self
            except OSError:
                assert self.process.poll() is None, "the server ended by itself"
                time.sleep(0.1)
        raise TimeoutError("the server did not answer within a minute")

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None
