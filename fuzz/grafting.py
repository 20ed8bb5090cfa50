"""Valid JSON with a few parts replaced, which mutated bytes hardly ever are."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import atheris

ODD = (None, True, 0, 1, -1, 2.5, 2**40, 10**400, 1e308, float("nan"), float("inf"), "", "first", [], {}, [None], [[]])


def grafted(value: Any, data: bytes) -> bytes:
    """`value` as JSON after one to four replacements that `data` chooses."""
    source = atheris.FuzzedDataProvider(data)
    for _ in range(source.ConsumeIntInRange(1, 4)):
        value = _graft(value, source)
    return json.dumps(value).encode()


def choices(kind: int) -> list[bytes]:
    """Seeds for the kind of input that is grafted: a few different choices."""
    return [bytes([kind]) + hashlib.sha512(bytes([number])).digest() for number in range(8)]


def _graft(value: Any, source: atheris.FuzzedDataProvider) -> Any:
    if isinstance(value, dict | list) and value and source.ConsumeIntInRange(0, 5):
        places = list(value) if isinstance(value, dict) else range(len(value))
        place = places[source.ConsumeIntInRange(0, len(places) - 1)]
        changed: Any = value.copy()
        if source.ConsumeIntInRange(0, 7):
            changed[place] = _graft(value[place], source)
        else:
            del changed[place]
        return changed
    return _grown(source, 0)


def _grown(source: atheris.FuzzedDataProvider, depth: int) -> Any:
    kind = source.ConsumeIntInRange(0, 4 if depth < 3 else 2)
    if kind <= 1:
        return ODD[source.ConsumeIntInRange(0, len(ODD) - 1)]
    if kind == 2:
        return source.ConsumeUnicode(source.ConsumeIntInRange(0, 12))
    parts = [_grown(source, depth + 1) for _ in range(source.ConsumeIntInRange(0, 3))]
    return parts if kind == 3 else {source.ConsumeUnicodeNoSurrogates(4): part for part in parts}
