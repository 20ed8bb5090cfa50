"""Pairs that people judged, to grade a judge against."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exalign.data.reading import DataSettings, read_rows
from exalign.errors import InputError
from exalign.judging.comparison import Comparison, read_comparisons
from exalign.judging.llm.pairs import Pair, choose
from exalign.judging.published import from_mt_bench, from_preference_records, from_summarize_from_feedback


def read_human(path: Path, counts: Counter[str]) -> list[Comparison]:
    """Comparisons by people, from whichever of these the file is: our own comparison records, MT-bench judgements,
    comparisons of summaries from feedback, or preference data in any format that training reads.

    Rows of a published set that a model judged are read too; the judge's name says whose they are. What is left
    out is counted. A file with nothing to compare is an `InputError`.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if _is_ours(path):
        return read_comparisons(path)
    settings = DataSettings.model_validate({"source": str(path)})
    first = next(read_rows(settings, Counter()), None)
    columns = set() if first is None else set(first.values)
    if {"question_id", "winner", "conversation_a"} <= columns:
        found = list(from_mt_bench(_values(settings, counts), counts=counts))
    elif {"info", "summaries", "choice"} <= columns:
        found = list(from_summarize_from_feedback(_values(settings, counts), counts=counts))
    else:
        from exalign.data.reading import read_source

        records = read_source(settings, counts)
        preferences = from_preference_records(records, judge=f"preferences of {path.name}", counts=counts)
        found = [_unordered(comparison) for comparison in preferences]
    if not found:
        said = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items()) or "no rows"
        raise InputError(f"{path} holds no pair that somebody judged: {said}.")
    return found


def human_pairs(human: Sequence[Comparison], *, prompts: int, seed: int) -> tuple[Pair, ...]:
    """Each pair that was judged, once, of at most `prompts` prompts."""
    unique = {
        comparison.pair: Pair(
            prompt_id=comparison.prompt_id,
            prompt=comparison.prompt,
            first=comparison.first,
            second=comparison.second,
            first_text=comparison.first_text,
            second_text=comparison.second_text,
            reference=comparison.reference,
        )
        for comparison in reversed(human)
    }
    return choose(unique.values(), prompts=prompts, seed=seed)


def _unordered(comparison: Comparison) -> Comparison:
    """The two answers called `one` and `other` by a hash of their texts, and told in that order.

    A preference set lists the winner first, row after row. Told so, people would have said the same thing every time,
    and an agreement beyond chance (kappa, alpha) would not exist.
    """
    named = replace(comparison, first="one", second="other")
    digests = [hashlib.sha256(text.encode()).digest() for text in (comparison.first_text, comparison.second_text)]
    return named if digests[0] < digests[1] else replace(named, first="other", second="one").swapped()


def _is_ours(path: Path) -> bool:
    if not path.name.endswith(".jsonl"):
        return False
    try:
        with path.open(encoding="utf-8") as stream:
            row = json.loads(stream.readline() or "null")
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and {"version", "verdict", "prompt_id"} <= set(row)


def _values(settings: DataSettings, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    return (row.values for row in read_rows(settings, counts))
