"""Tables as CSV that a spreadsheet shows and does not calculate."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """The rows as CSV. A text that a spreadsheet would take for a formula gets an apostrophe; numbers stay numbers.

    >>> csv_text([["name", "value"], ["=1+1", -0.5], [None, 2]]).splitlines()
    ['name,value', "'=1+1,-0.5", ',2']
    """
    stream = io.StringIO()
    csv.writer(stream).writerows([_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
