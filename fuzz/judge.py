"""Fuzzes what a judge's answers go through: response bodies, stored exchanges and comparisons, verdicts, headers."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["exalign.judging"]):
    from exalign.judging.askers import seconds_to_wait, spellings
    from exalign.judging.comparisons import Comparison, Pair, read_comparisons, write_comparisons
    from exalign.judging.exchanges import parse_completion, read_answers
    from exalign.judging.instructions import read_verdict
    from exalign.judging.summary import judge_pair

from fuzz.contract import fuzz
from fuzz.grafting import choices, grafted

FOLDER = Path(tempfile.mkdtemp(prefix="exalign-fuzz-"))
PAIR = Pair("0", "Which?", "exo", "sft", "one", "other")
COMPARISON = Comparison("0", "Hi", "exo", "sft", "a", "b", judge="j", verdict="first", left="first", time="now")
BODY = json.dumps(
    {
        "choices": [{"message": {"content": "Verdict: A"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
)
EXCHANGE = {"version": 1, "key": "first", "outcome": "answered", "request": {}, "response": BODY, "seconds": 1.0}

CHAT = replace(COMPARISON, prompt=({"role": "user", "content": "a"},), criteria={"safe": "tie"})
write_comparisons(FOLDER / "seed.jsonl", [CHAT])
LINE = (FOLDER / "seed.jsonl").read_bytes()


def read(data: bytes) -> None:
    """The first byte says where the others came from."""
    if not data:
        return
    kind, rest = data[0] % 8, data[1:]
    text = rest.decode("utf-8", "replace")
    path = FOLDER / "file.jsonl"
    if kind == 5:
        kind, text = 1, grafted(json.loads(BODY), rest).decode()
    elif kind == 6:
        kind, rest = 0, grafted({**EXCHANGE, "time": "now"}, rest) + b"\n"
    elif kind == 7:
        kind, rest = 3, grafted(json.loads(LINE), rest) + b"\n"
    if kind == 0:
        path.write_bytes(rest)
        judged(path)
    elif kind == 1:
        complete = parse_completion(text) is not None
        rows = [{**EXCHANGE, "key": key, "response": text, "time": "now"} for key in ("first", "second")]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if complete:  # what was accepted as an answer must be readable as one ever after
            assert judged(path) == 2
    elif kind == 2:
        assert read_verdict(text) in ("left", "right", "tie", "unreadable")
        key = text[:8]
        assert not key or "*" in key or key not in spellings(key).sub("*", text)
    elif kind == 3:
        path.write_bytes(rest)
        found = read_comparisons(path)
        assert len({comparison.key for comparison in found}) <= len(found)
        write_comparisons(path, found)
        assert read_comparisons(path) == found
    else:
        wait = seconds_to_wait({"retry-after": text})
        assert wait is None or 0 <= wait < float("inf")


def judged(path: Path) -> int:
    """How many orders of the pair the stored exchanges answer."""
    judgement = judge_pair(PAIR, {"first": "first", "second": "second"}, read_answers(path), "j")
    write_comparisons(path.with_name("verdicts.jsonl"), judgement.orders)
    return len(judgement.orders)


def seeds() -> list[bytes]:
    """A valid input of each kind."""
    lines = "".join(json.dumps({**EXCHANGE, "key": key, "time": "now"}) + "\n" for key in ("first", "second"))
    answers = [b"\2It depends.\n**Verdict: B**", b"\2<think>Verdict: A</think>\nVerdict: answer tie."]
    headers = [b"\4" + value for value in (b"7", b"Wed, 21 Oct 2026 07:28:00 GMT", b"1e400")]
    return [
        b"\0" + lines.encode(),
        b"\1" + BODY.encode(),
        *answers,
        b"\3" + LINE,
        *choices(5),
        *choices(6),
        *choices(7),
        *headers,
    ]


if __name__ == "__main__":
    fuzz("judge", read, seeds())
