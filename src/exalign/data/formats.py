"""What people already have, as records: the one place that knows the column names of the ecosystem.

| columns of a row | becomes |
|---|---|
| `prompt`, `chosen`, `rejected` | K = 2, `preferred` = 0 |
| `chosen`, `rejected` | the same; the prompt is what both dialogues begin with |
| `prompt`, `completions`, `rewards` (or without) | K-wise, with rewards |
| `prompt`, `completion`, (`label`) | K = 1 |
| `messages` | K = 1: the last assistant message; without one, a prompt only |
| `prompt` | K = 0, a prompt to sample for |
| `text`, (`label`) | K = 1 with an empty prompt, or the first `prompt_tokens` tokens as the prompt |

Prompts, completions and sides may be text or chat messages. A `label` of 0 or 1 becomes the completion's reward.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from exalign.data.conversations import (
    ASSISTANT,
    clean_answer,
    clean_messages,
    clean_prompt,
    clean_text,
    shared_messages,
    shared_prompt,
)
from exalign.data.record import Completion, Prompt, Record
from exalign.data.sources import DataSettings, SourceRow, local_path, read_rows
from exalign.data.store import iter_records
from exalign.data.tokenization import split_text
from exalign.errors import InputError

__all__ = ["DataSettings", "read_source", "record_of"]

Values = Mapping[str, Any]
Parts = tuple[Prompt, tuple[Completion, ...], int | None]
"""Prompt, completions, preferred."""

_ACCEPTED = (
    "prompt+chosen+rejected, chosen+rejected, prompt+completions+rewards, prompt+completion, messages, prompt, or text"
)


def read_source(
    settings: DataSettings, counts: Counter[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[Record]:
    """The records of a source, streamed. `tokenizer` is needed (and used) only where `prompt_tokens` is set.

    A row's id is its place in the source (`train.jsonl:17`), so it does not depend on shuffling or limits.
    `counts` receives `rows` and `records`, and what was dropped: `pairs_equal`, `pairs_with_empty_side`,
    `pairs_without_common_prompt`, `empty_completions`, `texts_too_short`. A missing source or a setting that
    cannot take effect is an `InputError` now, a malformed row one (naming file and row) when it is reached.
    """
    path = local_path(settings)
    if settings.prompt_tokens is not None and tokenizer is None:
        raise InputError("`prompt_tokens` cuts texts with a tokenizer, which is not used where this data is read.")
    if path is not None and any((path / name).exists() for name in ("part-000000.parquet", "header.json")):
        return _own_records(path, settings, counts)
    return _foreign_records(read_rows(settings, counts), settings.prompt_tokens, counts, tokenizer)


def _own_records(folder: Path, settings: DataSettings, counts: Counter[str]) -> Iterator[Record]:
    if not (folder / "header.json").exists():
        raise InputError(f"{folder} was not finished (it has no header.json): run the stage that writes it again.")
    for name in ("name", "split", "columns", "prompt_tokens", "shuffle_seed"):
        if getattr(settings, name):
            raise InputError(f"`{name}` cannot take effect on {folder}, which already holds records.")
    stop = None if settings.limit is None else settings.skip + settings.limit
    return _count_records(islice(iter_records(folder), settings.skip, stop), counts)


def _count_records(records: Iterator[Record], counts: Counter[str]) -> Iterator[Record]:
    for record in records:
        counts["rows"] += 1
        counts["records"] += 1
        yield record


def _foreign_records(
    rows: Iterator[SourceRow],
    prompt_tokens: int | None,
    counts: Counter[str],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[Record]:
    for row in rows:
        record = record_of(row, counts)
        if record is not None and prompt_tokens is not None and tokenizer is not None:
            if "text" not in row.values or record.prompt != "":
                raise row.problem("`prompt_tokens` applies to rows of plain `text`; this one has its own prompt.")
            record = split_text(record, tokenizer, prompt_tokens=prompt_tokens, counts=counts)
        if record is not None:
            counts["records"] += 1
            yield record


def record_of(row: SourceRow, counts: Counter[str]) -> Record | None:
    """The record of one row, or None where it was dropped (and counted). A malformed row is an `InputError`."""
    convert = next((function for needed, function in _SHAPES if needed <= row.values.keys()), None)
    orphans = sorted({"chosen", "rejected", "completion", "completions", "rewards"} & row.values.keys())
    if convert is None or (convert in (_prompt_only, _text) and orphans):
        found = ", ".join(map(repr, row.values)) or "none"
        raise row.problem(f"its columns are {found}, but needed are {_ACCEPTED}; `columns` renames.")
    try:
        parts = convert(row.values, counts)
    except ValueError as error:
        raise row.problem(str(error)) from None
    if parts is None:
        return None
    prompt, completions, preferred = parts
    return Record(row.id, prompt, completions, preferred=preferred)


def _preference(values: Values, counts: Counter[str]) -> Parts | None:
    split = _explicit_sides(values, counts) if _has_own_prompt(values) else _implicit_sides(values, counts)
    if split is None:
        counts["pairs_without_common_prompt"] += 1
        return None
    prompt, sides = split
    if not all(side.strip() for side in sides):
        counts["pairs_with_empty_side"] += 1
        return None
    if sides[0].strip() == sides[1].strip():
        counts["pairs_equal"] += 1
        return None
    return prompt, tuple(Completion(side) for side in sides), 0


def _has_own_prompt(values: Values) -> bool:
    """Whether the sides are answers only. Whole conversations bring the prompt along, even beside a `prompt`."""
    side = values["chosen"]
    return values.get("prompt") is not None and (not isinstance(side, list | tuple) or len(side) == 1)


def _explicit_sides(values: Values, counts: Counter[str]) -> tuple[Prompt, list[str]]:
    sides = [clean_answer(values[name], name, counts) for name in ("chosen", "rejected")]
    return clean_prompt(values["prompt"], "prompt", counts), sides


def _implicit_sides(values: Values, counts: Counter[str]) -> tuple[Prompt, list[str]] | None:
    names = ("chosen", "rejected")
    if not all(isinstance(values[name], str) for name in names):
        return shared_messages([clean_messages(values[name], name, counts) for name in names])
    sides = [clean_text(values[name], name, counts) for name in names]
    if not any(ASSISTANT in side for side in sides):
        raise ValueError(f"it has no `prompt`, and its sides have no {ASSISTANT!r} to find the prompt by.")
    return shared_prompt(sides)


def _kwise(values: Values, counts: Counter[str]) -> Parts:
    texts = _list(values["completions"], "completions")
    if not texts:
        raise ValueError("`completions` is empty.")
    completions = tuple(Completion(clean_answer(text, f"completions[{i}]", counts)) for i, text in enumerate(texts))
    if values.get("rewards") is not None:
        rewards = _list(values["rewards"], "rewards")
        if len(rewards) != len(completions):
            raise ValueError(f"it has {len(completions)} completions but {len(rewards)} rewards.")
        completions = tuple(
            Completion(c.text, reward=_reward(r, i)) for i, (c, r) in enumerate(zip(completions, rewards, strict=True))
        )
    return clean_prompt(values["prompt"], "prompt", counts), completions, None


def _list(value: Any, name: str) -> Sequence[Any]:
    """A list; a CSV cell spells it as JSON."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"`{name}` must be a list, but is {type(value).__name__}.")
    return value


def _reward(value: Any, position: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"reward {position + 1} must be a finite number, but is {value!s:.40}.")
    return float(value)


def _sft(values: Values, counts: Counter[str]) -> Parts | None:
    prompt = clean_prompt(values["prompt"], "prompt", counts)
    return _single(prompt, clean_answer(values["completion"], "completion", counts), values, counts)


def _messages(values: Values, counts: Counter[str]) -> Parts | None:
    value = values["messages"]
    messages = clean_messages(_list(value, "messages") if isinstance(value, str) else value, "messages", counts)
    if messages[-1]["role"] != "assistant":
        return messages, (), None
    return _single(messages[:-1], messages[-1]["content"], values, counts)


def _prompt_only(values: Values, counts: Counter[str]) -> Parts:
    return clean_prompt(values["prompt"], "prompt", counts), (), None


def _text(values: Values, counts: Counter[str]) -> Parts | None:
    return _single("", clean_text(values["text"], "text", counts), values, counts)


def _single(prompt: Prompt, text: str, values: Values, counts: Counter[str]) -> Parts | None:
    if not text.strip():
        counts["empty_completions"] += 1
        return None
    return prompt, (Completion(text, reward=_label(values.get("label"), counts)),), None


def _label(value: Any, counts: Counter[str]) -> float | None:
    """A label of 0 or 1 (or a truth value, or the digit in a CSV cell) as a reward; others are left out, counted."""
    if value is None:
        return None
    if value in (0, 1, "0", "1"):
        return float(value)
    counts["labels_left_out"] += 1
    return None


_SHAPES: tuple[tuple[set[str], Callable[[Values, Counter[str]], Parts | None]], ...] = (
    ({"chosen", "rejected"}, _preference),
    ({"prompt", "completions"}, _kwise),
    ({"prompt", "completion"}, _sft),
    ({"messages"}, _messages),
    ({"prompt"}, _prompt_only),
    ({"text"}, _text),
)
