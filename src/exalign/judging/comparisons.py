"""The one record of a judgement: two answers to one prompt (a `Pair`), and who found which better (a `Comparison`).

Language models and people write the same record, and so do the readers of published human-labelled sets
(`grading.py`): a judge can be graded against people, and win, tie and lose are counted in one place.

A file of comparisons is JSON Lines (`datasets.load_dataset("json")` reads it), one judgement per line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
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
QUESTIONS = {
    "instruction": "Follows the instruction",
    "correct": "Correct",
    "fluent": "Fluent",
    "safe": "Safe",
    "helpful": "Helpful",
}
"""What people are asked besides the overall verdict, by the name of the criterion."""
CRITERIA = tuple(QUESTIONS)
OTHER: dict[Side, Side] = {"first": "second", "second": "first"}
_FLIPPED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie", "unreadable": "unreadable"}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt: `first_text` by the system `first`, `second_text` by `second`."""

    prompt_id: str
    prompt: Prompt
    first: str
    second: str
    first_text: str
    second_text: str
    reference: str | None = field(default=None, kw_only=True)
    """The reference answer that a judge may see, where there is one."""

    @property
    def identical(self) -> bool:
        """Both answers are the same text: a tie that no model has to be asked about."""
        return self.first_text == self.second_text

    @property
    def pair(self) -> str:
        """A short content hash of what is compared, the same whichever system is called first and whoever judges."""
        sides = sorted([[self.first, self.first_text], [self.second, self.second_text]])
        return fingerprint([self.prompt_id, sides])

    def text(self, side: Side) -> str:
        return self.first_text if side == "first" else self.second_text

    def judged(self, judge: str, verdict: Verdict, *, left: Side | None = None) -> Comparison:
        values = {name: getattr(self, name) for name in _PAIR}
        return Comparison(**values, judge=judge, verdict=verdict, left=left)


_PAIR = tuple(f.name for f in fields(Pair))


@dataclass(frozen=True, slots=True)
class Comparison(Pair):
    """One judgement of a pair.

    `left` says which of the two answers stood on the left (or came first in the text that a model read), None where
    unknown; verdicts are always about the systems, so a verdict never has to be turned round by its reader.

    >>> c = Comparison(prompt_id="7", prompt="Hi", first="exo", second="sft", first_text="a", second_text="b",
    ...                judge="ann", verdict=verdict_from_shown("left", left="second"), left="second")
    >>> c.verdict, c.shown_verdict, c.swapped().verdict, c.key == c.swapped().key
    ('second', 'left', 'first', True)
    """

    judge: str
    verdict: Verdict
    left: Side | None = None
    criteria: Mapping[str, Verdict] = field(default_factory=dict)
    """The verdict for each criterion that was asked for and answered."""
    comment: str | None = None
    answer: str | None = None
    """The judge's answer exactly as it came, where it is text."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float | None = None
    """Time from asking (or showing) to the verdict."""
    time: str | None = None
    """When the verdict was given: ISO 8601, UTC."""

    @property
    def shown_verdict(self) -> str | None:
        """The verdict as the judge saw it: `left`, `tie`, `right` or `unreadable`; None if the order is unknown."""
        if self.verdict in ("tie", "unreadable"):
            return self.verdict
        return self.left and ("left" if self.verdict == self.left else "right")

    @property
    def key(self) -> str:
        """A short content hash of the question: the pair, the judge, and the order shown. One judgement per key."""
        side = self.left and [getattr(self, self.left), self.text(self.left)]
        return fingerprint([self.pair, self.judge, side])

    def swapped(self) -> Comparison:
        """The same judgement with the other system called `first`."""
        return replace(
            self,
            first=self.second,
            second=self.first,
            first_text=self.second_text,
            second_text=self.first_text,
            verdict=_FLIPPED[self.verdict],
            left=self.left and OTHER[self.left],
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
    verdicts: dict[str, Verdict] = {"left": left, "right": OTHER[left], "tie": "tie", "unreadable": "unreadable"}
    if shown not in verdicts:
        raise InputError(f"A verdict must be left, tie, right or unreadable, not {shown!r}.")
    return verdicts[shown]


def write_comparisons(path: Path, comparisons: Iterable[Comparison]) -> None:
    """Write a whole file of comparisons at once, atomically, replacing what stood there."""
    with atomic_path(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(_to_line(comparison) for comparison in comparisons)


def read_comparisons(path: Path) -> list[Comparison]:
    """All comparisons of a file; a line that is none, also one that was cut off, is an `InputError` that names it."""
    try:
        with Path(path).open("rb") as stream:
            return [_from_line(line, where=f"{path}, line {number}") for number, line in enumerate(stream, start=1)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


_COMPARISON = TypeAdapter(Comparison)
_NAMES = tuple(f.name for f in fields(Comparison))


def _to_line(comparison: Comparison) -> str:
    text, messages = (comparison.prompt, None) if isinstance(comparison.prompt, str) else (None, comparison.prompt)
    values = {"version": FORMAT_VERSION, **asdict(comparison), "prompt": text, "messages": messages}
    return json.dumps(values, ensure_ascii=True, allow_nan=False) + "\n"


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
