"""A judge's endpoint that goes away in the middle, for as long as one likes, and comes back."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from exalign.data.record import Completion, Record
from exalign.data.store import Header, write_records
from faults.starts import Ended, Starter

PROMPTS = 24
CONCURRENCY = 3


class Server:
    """Answers every question with "tie" after a moment. `close` drops what it is answering; `open` takes the same port.

    `received` counts how often each question came, `dropped` which were under way when it went away.
    """

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._closed, self._port = threading.Event(), 0
        self.open()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def open(self) -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                question = json.loads(body)["messages"][0]["content"]
                owner.received[question] += 1
                if owner._closed.wait(0.1):
                    owner.dropped[question] += 1
                    return
                choice = {"index": 0, "message": {"content": "Verdict: tie"}, "finish_reason": "stop"}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [choice]}).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._closed.clear()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class Away:
    """What came of it. `repeated`: questions that came twice; `under_way`: those that it was answering when it left."""

    seconds: float
    questions: int
    answered: int
    repeated: list[str]
    under_way: list[str]
    asked_by_a_second_run: int
    first: Ended

    @property
    def kept(self) -> bool:
        """Everything was answered, and nothing was asked twice but what was never answered."""
        return self.answered == self.questions and self.repeated == self.under_way and not self.asked_by_a_second_run


def endpoint_away(starter: Starter, place: Path, *, seconds: float) -> Away:
    """Judge a small run; after a few answers the endpoint is away for so many seconds."""
    run = _run(place / "judged")
    server = Server()
    options = ("--concurrency", CONCURRENCY, "--retry-wait", min(1.0, seconds / 20), "--prompts", PROMPTS)
    command = ["judge", run, "--against", "sft", "--endpoint", server.address, "--model", "ties", *options]
    starter.start(command, place / "log", environment={"OPENAI_API_KEY": ""})
    while sum(server.received.values()) < 7:
        time.sleep(0.005)
    server.close()
    assert starter.wait(seconds) is None, "it did not wait"
    server.open()
    first = starter.wait()
    assert first is not None
    (exchanges,) = run.rglob("exchanges.jsonl")
    rows = [json.loads(line) for line in exchanges.read_text().splitlines()]
    repeated, before = sorted(q for q, count in server.received.items() if count > 1), sum(server.received.values())
    starter.exalign(*command, log=place / "again", environment={"OPENAI_API_KEY": ""})
    again = sum(server.received.values()) - before
    server.close()
    answered = sum(row["outcome"] == "answered" for row in rows)
    return Away(seconds, len(server.received), answered, repeated, sorted(server.dropped), again, first)


def _run(folder: Path) -> Path:
    def write(name: str, text: str) -> None:
        rows = [Record(str(i), f"Question {i}", (Completion(f"{text} {i}"),) if text else ()) for i in range(PROMPTS)]
        write_records(folder / "evaluation" / name, rows, Header())

    write("prompts", "")
    write("sft/samples", "one")
    write("exo/step-000001/samples", "another")
    return folder
