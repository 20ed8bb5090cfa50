"""The one record of a judgement: two answers to one prompt, and who found which better.

Language models and people write the same record, and so do the readers of published human-labelled sets
(`published.py`): a judge can be graded against people, and win, tie and lose are counted in one place.

A file of comparisons is JSON Lines (`datasets.load_dataset("json")` reads it), one judgement per line, appended and
synced before `write` returns: a kill loses at most the line under way, which the next writer removes and counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from exalign.data.record import Prompt
from exalign.errors import InputError
from exalign.storage import atomic_path, fingerprint, finite

FORMAT_VERSION = 1
Verdict = Literal["first", "tie", "second", "unreadable"]
"""Which system won, whatever the order shown; `unreadable` is an answer that could not be read, never a guess."""
Side = Literal["first", "second"]
VERDICTS: tuple[Verdict, ...] = ("first", "tie", "second", "unreadable")
CRITERIA = ("instruction", "correct", "fluent", "safe", "helpful")
"""Follows the instruction, correct, fluent, safe, helpful: what people are asked besides the overall verdict."""
_FLIPPED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie", "unreadable": "unreadable"}
_SHOWN = {("first", "first"): "left", ("second", "second"): "left", ("first", "second"): "right"}
_SHOWN[("second", "first")] = "right"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One judgement of two answers, `first_text` of the system `first` and `second_text` of `second`.

    `left` says which of the two stood on the left (or came first in the text that a model read), None where
    unknown; verdicts are always about the systems, so a verdict never has to be turned round by its reader.

    >>> c = Comparison(prompt_id="7", prompt="Hi", first="exo", second="sft", first_text="a", second_text="b",
    ...                judge="ann", verdict=verdict_from_shown("left", left="second"), left="second")
    >>> c.verdict, c.shown_verdict, c.swapped().verdict, c.key == c.swapped().key
    ('second', 'left', 'first', True)
    """

    prompt_id: str
    prompt: Prompt
    first: str
    second: str
    first_text: str
    second_text: str
    judge: str
    verdict: Verdict
    left: Side | None = None
    criteria: Mapping[str, Verdict] = field(default_factory=dict)
    """The verdict for each criterion that was asked for and answered."""
    reference: str | None = None
    """The reference answer that the judge could see, where there was one."""
    comment: str | None = None
    answer: str | None = None
    """The judge's answer exactly as it came, where it is text."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float | None = None
    """Time from asking (or showing) to the verdict."""
    time: str | None = None
    """When the verdict was given: ISO 8601, UTC."""

    def __post_init__(self) -> None:
        for name, verdict in [("verdict", self.verdict), *self.criteria.items()]:
            if verdict not in VERDICTS:
                raise InputError(
                    f"Comparison of prompt {self.prompt_id}: {name} is {verdict!r}, not one of {VERDICTS}."
                )
        if self.left not in (None, "first", "second"):
            raise InputError(f"Comparison of prompt {self.prompt_id}: left is {self.left!r}, not 'first' or 'second'.")

    @property
    def shown_verdict(self) -> str | None:
        """The verdict as the judge saw it: `left`, `tie`, `right` or `unreadable`; None if the order is unknown."""
        if self.verdict in ("tie", "unreadable"):
            return self.verdict
        return None if self.left is None else _SHOWN[self.verdict, self.left]

    @property
    def pair(self) -> str:
        """A short content hash of what was compared, the same whichever system is called first and whoever judges."""
        sides = sorted([[self.first, self.first_text], [self.second, self.second_text]])
        return fingerprint([self.prompt_id, sides])

    @property
    def key(self) -> str:
        """A short content hash of the question: the pair, the judge, and the order shown. One judgement per key."""
        sides = {"first": [self.first, self.first_text], "second": [self.second, self.second_text], None: None}
        return fingerprint([self.pair, self.judge, sides[self.left]])

    def swapped(self) -> Comparison:
        """The same judgement with the other system called `first`."""
        return replace(
            self,
            first=self.second,
            second=self.first,
            first_text=self.second_text,
            second_text=self.first_text,
            verdict=_FLIPPED[self.verdict],
            left=None if self.left is None else ("second" if self.left == "first" else "first"),
            criteria={name: _FLIPPED[verdict] for name, verdict in self.criteria.items()},
        )

    def oriented(self, first: str, second: str) -> Comparison:
        """The same judgement told as `first` against `second`; `InputError` if it compares other systems."""
        if (self.first, self.second) == (first, second):
            return self
        if (self.second, self.first) == (first, second):
            return self.swapped()
        raise InputError(f"The comparison of {self.first} with {self.second} is not one of {first} with {second}.")


def verdict_from_shown(shown: str, *, left: Side) -> Verdict:
    """`left`, `tie`, `right` or `unreadable`, as the judge saw it, as a verdict about the systems.

    >>> verdict_from_shown("right", left="second")
    'first'
    """
    if shown == "left":
        return left
    if shown == "right":
        return "second" if left == "first" else "first"
    if shown == "tie":
        return "tie"
    if shown == "unreadable":
        return "unreadable"
    raise InputError(f"A verdict must be left, tie, right or unreadable, not {shown!r}.")


class ComparisonWriter:
    """Appends comparisons to a JSON Lines file; each is on disk when `write` returns.

    Opening a file that stands there continues it: `keys` holds what is judged already, so that a second run asks
    only what is missing; writing a key twice is a `ValueError`. `torn` counts what an interrupted write left behind
    (0 or 1): that half line is removed. One writer per file at a time.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "comparisons.jsonl"
    >>> with ComparisonWriter(path) as writer:
    ...     writer.write(Comparison("7", "Hi", "exo", "sft", "a", "b", judge="ann", verdict="tie", left="first"))
    >>> [c.verdict for c in read_comparisons(path)], len(ComparisonWriter(path).keys)
    (['tie'], 1)
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.torn = _remove_torn_line(self.path)
        self.keys = {c.key for c in iter_comparisons(self.path)} if self.path.exists() else set()
        self._stream = self.path.open("a", encoding="utf-8")

    def write(self, comparison: Comparison) -> None:
        """Append one comparison and sync it to disk."""
        if (key := comparison.key) in self.keys:
            raise ValueError(f"{self.path} already has judge {comparison.judge} on prompt {comparison.prompt_id}.")
        try:
            self._stream.write(_to_line(comparison))
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise InputError(f"Cannot write {self.path}: {error.strerror}. What stood there is intact.") from error
        self.keys.add(key)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> ComparisonWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def write_comparisons(path: Path, comparisons: Iterable[Comparison]) -> None:
    """Write a whole file of comparisons at once, atomically, replacing what stood there."""
    with atomic_path(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(_to_line(comparison) for comparison in comparisons)


def iter_comparisons(path: Path) -> Iterator[Comparison]:
    """Stream the comparisons of a file; a last line without its end (an interrupted write) is not a comparison."""
    path = Path(path)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    with stream:
        for number, line in enumerate(stream, start=1):
            if line.endswith(b"\n"):
                yield _from_line(line, where=f"{path}, line {number}")


def read_comparisons(path: Path) -> list[Comparison]:
    """All comparisons of a file, in memory."""
    return list(iter_comparisons(path))


_COMPARISON = TypeAdapter(Comparison)
_NAMES = tuple(f.name for f in fields(Comparison))


def _to_line(comparison: Comparison) -> str:
    values = {name: getattr(comparison, name) for name in _NAMES}
    plain = isinstance(comparison.prompt, str)
    values["prompt"] = comparison.prompt if plain else None
    values["messages"] = None if plain else [dict(message) for message in comparison.prompt]  # type: ignore[arg-type]
    values["criteria"] = dict(comparison.criteria)
    return json.dumps({"version": FORMAT_VERSION, **values}, ensure_ascii=True, allow_nan=False) + "\n"


def _from_line(line: bytes, *, where: str) -> Comparison:
    try:
        row: dict[str, Any] = json.loads(line.decode("utf-8"), parse_constant=finite, parse_float=finite)
        if row.get("version") != FORMAT_VERSION:
            found = str(row.get("version"))[:40]
            raise InputError(f"{where} has comparison format {found}; this exalign reads {FORMAT_VERSION}.")
        prompt: Prompt = row["prompt"] if row["messages"] is None else tuple(row["messages"])
        return _COMPARISON.validate_python({**{name: row[name] for name in _NAMES}, "prompt": prompt})
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"]))[:100]
        raise InputError(f"{where} is not a comparison that exalign wrote: {name} is wrong.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where} is not a comparison that exalign wrote ({error!r:.200}).") from None


def _remove_torn_line(path: Path) -> int:
    """Cut the file after its last complete line; how many half lines that removed (0 or 1)."""
    if not path.exists() or not (size := path.stat().st_size):
        return 0
    with path.open("rb+") as stream:
        end = size
        while end > 0:
            start = max(0, end - (1 << 16))
            stream.seek(start)
            if (newline := stream.read(end - start).rfind(b"\n")) >= 0:
                end = start + newline + 1
                break
            end = start
        if end == size:
            return 0
        stream.truncate(end)
        os.fsync(stream.fileno())
    return 1
