"""Real processes that start in milliseconds: `exalign` with its arguments, as the command line runs it.

Importing torch and transformers takes seconds, and the harness starts hundreds of processes. So one parent imports
them once, with one thread and without touching a tensor, and forks a child for every start; the child runs
`exalign.cli.main` and nothing else. What is killed is therefore a real process with its own memory and open files, and
SIGKILL reaches it at any instruction; only the seconds of importing are not gone through anew.

Where the system permits, the parent lives in a user and mount namespace of its own, in which a test may mount a small
disk.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve()
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "300"}
ISOLATE = ["unshare", "--user", "--map-root-user", "--mount"]


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it printed."""

    status: int
    printed: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def sentence(self) -> str:
        """The one sentence that a process left with, which must not be a traceback."""
        assert self.status == 2, self.printed
        assert "Traceback" not in self.printed, self.printed
        (line,) = [line for line in self.printed.splitlines() if line.startswith("error: ")]
        return line


class Starter:
    """The parent of the processes, which have its environment; one child at a time."""

    def __init__(self, **environment: str) -> None:
        self.isolated = subprocess.run([*ISOLATE, "true"], capture_output=True, check=False).returncode == 0
        command = [*(ISOLATE if self.isolated else []), sys.executable, str(HERE)]
        path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
        environment = {**os.environ, **ONE_THREAD, **environment, "PYTHONPATH": path}
        self._parent = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = 0
        self._log = Path()

    def start(self, arguments: Sequence[object], log: Path, *, environment: Mapping[str, str] | None = None) -> None:
        """Start `exalign` with these arguments; what it prints goes to `log`."""
        self._start(log, environment, arguments=[str(argument) for argument in arguments])

    def python(self, code: str, log: Path, *, environment: Mapping[str, str] | None = None) -> Ended:
        """Run this code instead of `exalign`, to the end."""
        self._start(log, environment, code=code)
        ended = self.wait()
        assert ended is not None
        return ended

    def _start(self, log: Path, environment: Mapping[str, str] | None, **order: Any) -> None:
        self._log = log
        self.pid = self._ask({**order, "log": str(log), "environment": dict(environment or {})})["pid"]

    def wait(self, seconds: float | None = None) -> Ended | None:
        """How the process ended; None where it still runs after so many seconds."""
        assert self._parent.stdout is not None
        if seconds is not None and not select.select([self._parent.stdout], [], [], seconds)[0]:
            return None
        return Ended(self._read()["status"], self._log.read_text(errors="replace"))

    def kill(self) -> Ended:
        """SIGKILL."""
        with suppress(ProcessLookupError):  # it ended by itself meanwhile
            os.kill(self.pid, signal.SIGKILL)
        ended = self.wait()
        assert ended is not None
        return ended

    def exalign(self, *arguments: object, log: Path, environment: Mapping[str, str] | None = None) -> Ended:
        """Run to the end."""
        log.unlink(missing_ok=True)
        self.start(arguments, log, environment=environment)
        ended = self.wait()
        assert ended is not None
        return ended

    def command(self, *words: object) -> None:
        """Run another program where the processes live, which may be a namespace of theirs; it must succeed."""
        done = self._ask({"command": [str(word) for word in words]})
        assert done["status"] == 0, done

    def close(self) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(order).encode() + b"\n")
        self._parent.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        """The next line; unbuffered, so that `select` sees what is still to come."""
        assert self._parent.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            piece = os.read(self._parent.stdout.fileno(), 1)
            assert piece, "the parent of the processes has ended"
            line += piece
        return json.loads(line)


def serve() -> None:
    """The parent: carry out the orders that come in."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints is taken for an answer
    import_everything()
    for line in sys.stdin:
        order = json.loads(line)
        if "command" in order:
            done = subprocess.run(order["command"], capture_output=True, text=True, check=False)
            answer = {"status": done.returncode, "said": done.stderr}
        else:
            pid = os.fork()
            if pid == 0:
                _be_exalign(order)
            print(json.dumps({"pid": pid}), file=answers, flush=True)
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # taking torch apart takes a second


def import_everything() -> None:
    """What a run imports sooner or later; nothing here may start a thread, which a fork would lose."""
    gc.disable()
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch.distributed.checkpoint.state_dict  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import exalign.cli
    import exalign.judging.assess
    import exalign.run.carry_out  # noqa: F401

    gc.freeze()  # what stays is neither searched for garbage nor copied
    gc.enable()


def _be_exalign(order: dict[str, Any]) -> NoReturn:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in (nothing, 0), (log, 1), (log, 2):
        os.dup2(source, target)
    os.environ.update(order["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background does not hear it
    status = 1
    try:
        from exalign.cli import main

        if "code" in order:
            exec(order["code"], {"__name__": "__main__"})
        else:
            main(order["arguments"])
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
