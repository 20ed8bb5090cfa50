"""What the tokens of a data source are: which belong to the prompt, which to a completion, what is cut, and counts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from exalign.data.reading import DataSettings, read_source
from exalign.data.record import Record
from exalign.data.tokenization import (
    TokenLimits,
    UnfitError,
    end_ids,
    has_equal_rival,
    token_text,
    tokenize_record,
    with_token_ids,
)
from exalign.terminal import escape_controls

_NEAR = 60
"""Tokens shown on either side of an end or a cut; the middle of long runs is left out of the picture."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its id, its text with control characters escaped, and whether a limit cut it away."""

    id: int
    text: str
    cut: bool


@dataclass(frozen=True, slots=True)
class InspectedCompletion:
    """The tokens of one completion and what is known about it; `ended` says whether it ends the sequence."""

    tokens: tuple[Token, ...]
    ended: bool
    preferred: bool
    reward: float | None


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """One record as the models will see it; `dropped` says why they will not, or nothing."""

    id: str
    prompt: tuple[Token, ...]
    completions: tuple[InspectedCompletion, ...]
    dropped: str
    weight: float | None
    tools: str | None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token numbers over all records: how many sequences, and their median and maximum before anything is cut."""

    number: int
    median: float
    maximum: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """The first rows of a source, and what holds for all of it."""

    rows: tuple[InspectedRow, ...]
    counts: dict[str, int]
    prompt_lengths: Lengths
    completion_lengths: Lengths
    limits: TokenLimits


def inspect_records(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limits: TokenLimits,
    counts: Counter[str],
    num_rows: int = 3,
) -> Inspection:
    """Tokenise all records, keep the first `num_rows` in full.

    `counts` is the counter that the reader of `records` fills; here it receives what tokenisation adds.
    """
    rows: list[InspectedRow] = []
    prompt_lengths: list[int] = []
    completion_lengths: list[int] = []
    for index, given in enumerate(records):
        try:
            record = with_token_ids(given, tokenizer, counts)
            group = tokenize_record(
                record,
                tokenizer,
                index=index,
                max_prompt_tokens=limits.max_prompt_tokens,
                max_completion_tokens=limits.max_completion_tokens,
                counts=counts,
            )
        except UnfitError as error:
            counts[error.reason] += 1
            if index < num_rows:
                rows.append(InspectedRow(given.id, (), (), str(error), given.weight, given.tools))
            continue
        prompt, completions = list(record.prompt_ids or ()), [list(c.token_ids or ()) for c in record.completions]
        prompt_lengths.append(len(prompt))
        completion_lengths.extend(map(len, completions))
        dropped = has_equal_rival(group)
        counts["pairs_equal_as_tokens"] += dropped
        if index < num_rows:
            kept_prompt = group.prompt_ids.tolist()
            kept = [ids.tolist() for ids in group.completion_ids]
            rows.append(
                InspectedRow(
                    record.id,
                    _prompt_tokens(prompt, kept_prompt, tokenizer),
                    tuple(_completions(record, completions, kept, tokenizer)),
                    "both sides have the same tokens" if dropped else "",
                    record.weight,
                    record.tools,
                )
            )
    shown = {name: number for name, number in counts.items() if number}
    return Inspection(tuple(rows), shown, _lengths(prompt_lengths), _lengths(completion_lengths), limits)


def inspect_source(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int = 3,
    max_prompt_tokens: int,
    max_completion_tokens: int,
) -> Inspection:
    """Read a data source and inspect its records: the counts are those of reading and of tokenisation together."""
    counts: Counter[str] = Counter()
    limits = TokenLimits(max_prompt_tokens=max_prompt_tokens, max_completion_tokens=max_completion_tokens)
    records = read_source(settings, counts, tokenizer)
    return inspect_records(records, tokenizer, limits=limits, counts=counts, num_rows=rows)


def _prompt_tokens(ids: list[int], kept: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[Token, ...]:
    """The uncut prompt; special tokens in front survive the cut behind them."""
    number_cut = len(ids) - len(kept)
    head = next(n for n in range(len(kept) + 1) if ids[n + number_cut :] == kept[n:])
    return tuple(_token(i, tokenizer, cut=head <= n < head + number_cut) for n, i in enumerate(ids))


def _completions(
    record: Record, completions: list[list[int]], kept: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> Iterable[InspectedCompletion]:
    ends = end_ids(tokenizer)
    for position, (ids, used) in enumerate(zip(completions, kept, strict=True)):
        yield InspectedCompletion(
            tokens=tuple(_token(i, tokenizer, cut=n >= len(used)) for n, i in enumerate(ids)),
            ended=used[-1] in ends,
            preferred=record.preferred == position,
            reward=record.completions[position].reward,
        )


def _token(token_id: int, tokenizer: PreTrainedTokenizerBase, *, cut: bool) -> Token:
    text = token_text(tokenizer, token_id)
    if not text or "\ufffd" in text:  # a part of a character, or nothing to see: its name in the vocabulary says more
        text = str(tokenizer.convert_ids_to_tokens(token_id))
    return Token(token_id, escape_controls(text), cut)


def _lengths(lengths: Sequence[int]) -> Lengths:
    return Lengths(len(lengths), statistics.median(lengths), max(lengths)) if lengths else Lengths(0, 0, 0)


def render_inspection(inspection: Inspection) -> RenderableType:
    """The inspection for a terminal. Tokens are set apart by `·`, cut ones struck through."""
    legend = Text.assemble(("prompt", "cyan"), "  ", ("completion", "green"), "  ", ("cut", "strike red"))
    return Renderables(legend, *map(_row_panel, inspection.rows), _summary(inspection))


def _row_panel(row: InspectedRow) -> Panel:
    parts = [_line("prompt", row.prompt, "cyan")] if row.prompt else [Text(escape_controls(row.dropped))]
    for number, completion in enumerate(row.completions, start=1):
        name = f"completion {number}" if len(row.completions) > 1 else "completion"
        name += " (preferred)" if completion.preferred else ""
        name += "" if completion.reward is None else f" (reward {completion.reward:g})"
        name += "" if completion.ended else " (no end-of-sequence)"
        parts.append(_line(name, completion.tokens, "green"))
    title = escape_controls(row.id) + ("" if row.weight is None else f", weight {row.weight:g}")
    title += ", with tools" if row.tools else ""
    title += f": dropped, {escape_controls(row.dropped)}" if row.dropped else ""
    return Panel(Renderables(*parts), title=Text(title), title_align="left", box=box.ROUNDED)


def _line(name: str, tokens: Sequence[Token], style: str) -> Text:
    number_cut = sum(token.cut for token in tokens)
    cut = f", {number_cut} cut" if number_cut else ""
    line = Text.assemble((f"{name}, {len(tokens) - number_cut} tokens{cut}: ", "bold"))
    last = -1
    for number in _shown_positions(tokens):
        line.append(f" … {number - last - 1:,} more … " if number > last + 1 else "·" if number else "", style="dim")
        line.append(tokens[number].text, style="strike red" if tokens[number].cut else style)
        last = number
    return line


def _shown_positions(tokens: Sequence[Token]) -> list[int]:
    """The positions near an end or near where a cut begins or ends; in a short sequence all."""
    edges = [0, len(tokens), *(n for n in range(1, len(tokens)) if tokens[n].cut != tokens[n - 1].cut)]
    return sorted({n for edge in edges for n in range(max(0, edge - _NEAR), min(len(tokens), edge + _NEAR))})


def _summary(inspection: Inspection) -> Table:
    table = Table(box=box.SIMPLE, title="All rows", title_justify="left")
    for heading in ("", "number", "median tokens", "longest", "limit"):
        table.add_column(heading, justify="left" if not heading else "right")
    limits = inspection.limits
    for name, lengths, limit in (
        ("prompts", inspection.prompt_lengths, limits.max_prompt_tokens),
        ("completions", inspection.completion_lengths, limits.max_completion_tokens),
    ):
        table.add_row(name, f"{lengths.number:,}", f"{lengths.median:g}", f"{lengths.maximum:,}", f"{limit:,}")
    for name, number in sorted(inspection.counts.items()):
        table.add_row(name if " " in name else name.replace("_", " "), f"{number:,}")
    return table
