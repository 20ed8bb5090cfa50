"""Win rates of every method and of best of N, by the run's scorer and by every judge (Tables 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exalign.evaluation.schema import Evidence, Interval, WinRate
from exalign.report.figure_verdicts import judged_tallies
from exalign.report.wording import visible, within_a_share
from exalign.spreadsheet import csv_text
from exalign.storage import write_json, write_text

SCORER = "scorer"
_OPPONENTS = {"sft": "SFT", "reference": "reference texts"}
"""How judged match-ups name what win rates are against."""


@dataclass(frozen=True)
class WinCell:
    """A win rate (a tie counts half) of `method` against `against`, as `by` has it."""

    method: str
    by: str
    against: str
    rate: Interval
    ties: float
    num_pairs: int


@dataclass(frozen=True)
class WinTable:
    """Cells under their columns `(by, against)`, in the order of `methods`; a cell that nobody measured is absent."""

    methods: list[str]
    columns: list[tuple[str, str]]
    cells: dict[tuple[str, str, str], WinCell]

    def cell(self, method: str, column: tuple[str, str]) -> WinCell | None:
        return self.cells.get((method, *column))


def win_table(evidence: Evidence) -> WinTable:
    """Methods in the order of the evidence, then the best of the largest N; the scorer's columns, then the judges'.

    A judge's cell is of a method at its last checkpoint, judged against samples of SFT or the reference texts.
    """
    rates = [(method.name, rate) for method in evidence.methods for rate in method.win_rates]
    if evidence.best_of_n:
        best = evidence.best_of_n[-1]
        rates += [(f"best of {best.n}", rate) for rate in best.win_rates]
    cells = [_by_scorer(name, rate) for name, rate in rates]
    known = {method.name for method in evidence.methods}
    for judge, tallies in judged_tallies(evidence):
        for opponent, against in _OPPONENTS.items():
            for tally in tallies:
                if tally.first in known and tally.second == opponent and tally.score is not None:
                    ties = 0.0 if tally.tie is None else tally.tie.estimate
                    cells.append(WinCell(tally.first, judge, against, tally.score, ties, tally.num_judgements))
    methods = dict.fromkeys([*(method.name for method in evidence.methods), *(cell.method for cell in cells)])
    filled = {cell.method for cell in cells}
    return WinTable(
        methods=[name for name in methods if name in filled],
        columns=list(dict.fromkeys((cell.by, cell.against) for cell in cells)),
        cells={(cell.method, cell.by, cell.against): cell for cell in cells},
    )


def write_win_table(table: WinTable, folder: Path, name: str, caption: str) -> list[Path]:
    """Write `name`.md, .csv and .json; return the paths."""
    paths = [folder / f"{name}.{kind}" for kind in ("md", "csv", "json")]
    write_text(paths[0], f"{as_markdown(table)}\n{caption}\n")
    write_text(paths[1], as_csv(list(table.cells.values())))
    write_json(paths[2], {"caption": caption, "cells": [_plain(cell) for cell in table.cells.values()]})
    return paths


def as_markdown(table: WinTable) -> str:
    """One row per method, `win rate % [low, high] (n prompts)` in a cell."""
    heads = ["method", *(f"{by}: against {against}" for by, against in table.columns)]
    rows = [[name, *(_text(table.cell(name, column)) for column in table.columns)] for name in table.methods]
    lines = [heads, ["---", *["---:"] * len(table.columns)], *rows]
    return "".join("| " + " | ".join(map(_escape, line)) + " |\n" for line in lines)


def as_csv(cells: Sequence[WinCell]) -> str:
    """One row per cell, all its numbers as shares in [0, 1]."""
    return csv_text([_FIELDS, *([_plain(cell)[name] for name in _FIELDS] for cell in cells)])


def _by_scorer(method: str, rate: WinRate) -> WinCell:
    return WinCell(method, SCORER, rate.opponent, rate.rate, rate.ties, rate.num_pairs)


_FIELDS = ("method", "by", "against", "win_rate", "low", "high", "num_prompts", "num_pairs", "ties")


def _plain(cell: WinCell) -> dict[str, str | float | int | None]:
    rate = cell.rate
    numbers = (rate.estimate, rate.low, rate.high, rate.num_prompts, cell.num_pairs, cell.ties)
    return dict(zip(_FIELDS, (cell.method, cell.by, cell.against, *numbers), strict=True))


def _text(cell: WinCell | None) -> str:
    if cell is None:
        return "–"
    rate, text = cell.rate, f"{100 * cell.rate.estimate:.1f}"
    if rate.low is not None and rate.high is not None:
        text += f" [{100 * within_a_share(rate.low):.1f}, {100 * within_a_share(rate.high):.1f}]"
    return f"{text} (n {rate.num_prompts})"


def _escape(text: str) -> str:
    return visible(" ".join(text.split())).replace("|", r"\|").replace("<", "&lt;")
