"""What the tokens of a data source are: which belong to the prompt, which to a completion, what is cut, and counts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

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
class InspectedRow:
    """One record as the models will see it: tokens of the prompt and of each completion, and whether that has its end.

    `dropped` says why they will not see it, or nothing.
    """

    record: Record
    dropped: str
    prompt: tuple[Token, ...] = ()
    completions: tuple[tuple[Token, ...], ...] = ()
    ended: tuple[bool, ...] = ()


@dataclass(slots=True)
class Inspection:
    """The first rows of a source, and what holds for all of it; lengths are in tokens, before anything is cut."""

    counts: Counter[str]
    limits: TokenLimits
    rows: list[InspectedRow] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    completion_lengths: list[int] = field(default_factory=list)


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
    found = Inspection(counts, limits)
    for index, given in enumerate(records):
        try:
            record = with_token_ids(given, tokenizer, counts)
            group = tokenize_record(record, tokenizer, index=index, limits=limits, counts=counts)
        except UnfitError as error:
            counts[error.reason] += 1
            if index < num_rows:
                found.rows.append(InspectedRow(given, str(error)))
            continue
        prompt, completions = list(record.prompt_ids or ()), [list(c.token_ids or ()) for c in record.completions]
        found.prompt_lengths.append(len(prompt))
        found.completion_lengths.extend(map(len, completions))
        dropped = has_equal_rival(group)
        if dropped:
            counts["pairs_equal_as_tokens"] += 1
        if index < num_rows:
            kept, ends = [ids.tolist() for ids in group.completion_ids], end_ids(tokenizer)
            found.rows.append(
                InspectedRow(
                    record,
                    "both sides have the same tokens" if dropped else "",
                    _prompt_tokens(prompt, group.prompt_ids.tolist(), tokenizer),
                    tuple(
                        tuple(_token(i, tokenizer, cut=n >= len(used)) for n, i in enumerate(ids))
                        for ids, used in zip(completions, kept, strict=True)
                    ),
                    tuple(used[-1] in ends for used in kept),
                )
            )
    return found


def _prompt_tokens(ids: list[int], kept: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[Token, ...]:
    """The uncut prompt; special tokens in front survive the cut behind them."""
    number_cut = len(ids) - len(kept)
    head = next(n for n in range(len(kept) + 1) if ids[n + number_cut :] == kept[n:])
    return tuple(_token(i, tokenizer, cut=head <= n < head + number_cut) for n, i in enumerate(ids))


def _token(token_id: int, tokenizer: PreTrainedTokenizerBase, *, cut: bool) -> Token:
    text = token_text(tokenizer, token_id)
    if not text or "\ufffd" in text:  # a part of a character, or nothing to see: its name in the vocabulary says more
        text = str(tokenizer.convert_ids_to_tokens(token_id))
    return Token(token_id, escape_controls(text), cut)


def render_inspection(inspection: Inspection) -> RenderableType:
    """The inspection for a terminal. Tokens are set apart by `·`, cut ones struck through."""
    legend = Text.assemble(("prompt", "cyan"), "  ", ("completion", "green"), "  ", ("cut", "strike red"))
    return Renderables(legend, *map(_row_panel, inspection.rows), _summary(inspection))


def _row_panel(row: InspectedRow) -> Panel:
    record = row.record
    parts = [_line("prompt", row.prompt, "cyan")] if row.prompt else [Text(escape_controls(row.dropped))]
    for place, (tokens, ended) in enumerate(zip(row.completions, row.ended, strict=True)):
        reward = record.completions[place].reward
        name = f"completion {place + 1}" if len(row.completions) > 1 else "completion"
        name += " (preferred)" if record.preferred == place else ""
        name += "" if reward is None else f" (reward {reward:g})"
        name += "" if ended else " (no end-of-sequence)"
        parts.append(_line(name, tokens, "green"))
    title = escape_controls(record.id) + ("" if record.weight is None else f", weight {record.weight:g}")
    title += ", with tools" if record.tools else ""
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
        median, longest = (statistics.median(lengths), max(lengths)) if lengths else (0, 0)
        table.add_row(name, f"{len(lengths):,}", f"{median:g}", f"{longest:,}", f"{limit:,}")
    for name, number in sorted(inspection.counts.items()):
        table.add_row(name if " " in name else name.replace("_", " "), f"{number:,}")
    return table
