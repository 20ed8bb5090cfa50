"""Everything that was asked and answered, in one append-only file, each line on disk before the next is taken up.

A question is known by the content of its request, so a second run asks only what has no answer yet, whatever was
killed, and a changed template, model or text is a new question. Failed attempts are kept too; they answer nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from exalign.errors import InputError
from exalign.storage import finite, whole_characters

FORMAT_VERSION = 1
MAX_TOKENS = 2**31
Body = dict[str, Any]
"""A request as the chat-completions interface takes it: `model`, `messages`, and how to sample."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one attempt.

    `outcome`: `answered` (a chat completion, whatever it says), `again` (worth another attempt), `away` (no connection
    came about, so nothing was asked), `refused` (this request will never be answered), `fatal` (no request will). `raw`
    is the body exactly as it came.
    """

    outcome: str
    raw: str | None = None
    http_status: int | None = None
    error: str | None = None
    retry_after: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answered question: the text of the message, and the tokens that it cost where the endpoint says so."""

    text: str
    refused: bool
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float = 0.0
    time: str = ""


def request_key(body: Body) -> str:
    """A content hash (32 hex digits) of a request, independent of the order of its fields."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def parse_completion(raw: str) -> Answer | None:
    """The chat completion in a response body, or None where the body is not one (cut off, malformed, an error).

    Of a content in parts those that are text are read, not what the model thought to itself; half a character, which
    JSON can spell, is read as U+FFFD.

    >>> parse_completion('{"choices": [{"message": {"content": "Verdict: A"}}]}').text
    'Verdict: A'
    >>> parse_completion('{"choices": [{"mess'), parse_completion('{"error": "overloaded"}')
    (None, None)
    """
    try:
        values = json.loads(raw)
        choice = values["choices"][0]
        content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part["type"] == "text")
        texts = content, refusal, choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    has_text = "content" in choice["message"] or refusal is not None
    if not has_text or any(text is not None and not isinstance(text, str) for text in texts):
        return None
    usage = values["usage"] if isinstance(values.get("usage"), dict) else {}
    cost = token_count(usage.get("prompt_tokens")), token_count(usage.get("completion_tokens"))
    return Answer(whole_characters(content or refusal or ""), bool(refusal), texts[2], *cost)


class ExchangeStore(AbstractContextManager["ExchangeStore"]):
    """The file of exchanges of one judge; opening it reads what stands there. One process at a time.

    A last line without its end was never acknowledged: it is removed, and `torn` says so (0 or 1).
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self.path} is in use by another judge; wait for it to end.") from None
        self.path.touch()
        self.answers, end = _load(self.path)
        self._stream = self.path.open("a+b")
        self.torn = int(end < self.path.stat().st_size)
        if self.torn:
            self._stream.truncate(end)

    def append(self, key: str, body: Body, reply: Reply) -> None:
        """Store one attempt and sync it. A second answer to a question is a `ValueError`."""
        if key in self.answers:
            raise ValueError(f"{self.path} already has the answer to {key}.")
        row = {
            "version": FORMAT_VERSION,
            "key": key,
            "outcome": reply.outcome,
            "request": body,
            "response": reply.raw,
            "http_status": reply.http_status,
            "error": reply.error,
            "seconds": round(reply.seconds, 4),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        try:
            self._stream.write(json.dumps(row, ensure_ascii=True).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise InputError(f"Cannot write {self.path}: {error.strerror}. What stood there is intact.") from error
        if reply.outcome == "answered":
            self.answers[key] = _answer(row)

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._lock.release()


def read_answers(path: Path) -> dict[str, Answer]:
    """The answers of a file of exchanges, by key, without opening it for writing; none where there is no file."""
    return _load(Path(path))[0] if Path(path).exists() else {}


def _load(path: Path) -> tuple[dict[str, Answer], int]:
    """The answers, and where the last complete line ends."""
    answers: dict[str, Answer] = {}
    end = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                row = json.loads(line, parse_constant=finite, parse_float=finite)
                if row["version"] != FORMAT_VERSION:
                    raise InputError(f"{path} has format {row['version']!s:.40}; this exalign reads {FORMAT_VERSION}.")
                if row["outcome"] == "answered":
                    answers[str(row["key"])] = _answer(row)
            except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number} is not an exchange ({error!r:.200}); restore the file, or move it "
                    "away to ask everything again."
                ) from None
    return answers, end


def _answer(row: Mapping[str, Any]) -> Answer:
    answer = parse_completion(row["response"])
    if answer is None:
        raise ValueError("an answered exchange without a completion")
    return replace(answer, seconds=float(row["seconds"]), time=str(row["time"]))


def token_count(value: Any) -> int | None:
    """A number of tokens as an endpoint reports it, None where it is none that could be."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS else None
