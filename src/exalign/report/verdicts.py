"""Who won: win rates by the run's scorer and by every judge (Tables 1 and 2), judged match-ups as bars (Figure 4)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exalign.evaluation.run_folder import BEST_OF as SYSTEM_BEST_OF
from exalign.evaluation.schema import Evidence, Interval, Tally, WinRate
from exalign.report.style import LIGHT, Look, drawable
from exalign.report.wording import best, csv_text, markdown, percent
from exalign.storage import write_json, write_text

SCORER, BEST_OF = "scorer", "best of "
_OPPONENTS = {"sft": "SFT", "reference": "reference texts"}
"""How judged match-ups name what win rates are against."""


@dataclass(frozen=True)
class WinCell:
    """A win rate (a tie counts half) of `method`, as `by` has it."""

    method: str
    by: str
    won: WinRate

    @property
    def column(self) -> tuple[str, str]:
        return self.by, self.won.opponent


@dataclass(frozen=True)
class WinTable:
    """Cells under their columns `(by, against)`, in the order of `methods`; a cell that nobody measured is absent."""

    cells: list[WinCell]
    methods: list[str]
    columns: list[tuple[str, str]]

    def cell(self, method: str, column: tuple[str, str]) -> WinCell | None:
        return next((cell for cell in self.cells if (cell.method, *cell.column) == (method, *column)), None)

    def sizes(self, column: tuple[str, str]) -> str:
        """On how many prompts the methods' rates of a column stand; those of best of N apart."""
        sizes = {c.won.rate.num_prompts for c in self.cells if c.column == column and not c.method.startswith(BEST_OF)}
        return "n " + "–".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))

    def best(self, column: tuple[str, str], shown: Callable[[Interval], str] = percent) -> set[str]:
        """The methods with the highest win rate of a column, as it is `shown`; best of N is none of them."""
        trained = [name for name in self.methods if not name.startswith(BEST_OF)]
        cells = {name: cell.won.rate for name in trained if (cell := self.cell(name, column))}
        return best({name: (rate.estimate, shown(rate)) for name, rate in cells.items()})


def win_table(evidence: Evidence) -> WinTable:
    """Methods in the order of the evidence, then the best of the largest N; columns of the scorer, its parts, judges.

    A judge's cell is of a method at its last checkpoint, judged against samples of SFT or the reference texts.
    """
    rates = [(method.name, rate) for method in evidence.methods for rate in method.win_rates]
    if evidence.best_of_n:
        most = evidence.best_of_n[-1]
        rates += [(f"{BEST_OF}{most.n}", rate) for rate in most.win_rates]
    cells = [WinCell(name, SCORER, rate) for name, rate in rates]
    # A part with all the weight is the scorer.
    parts = [(part, own, method.win_rates) for method in evidence.methods for part, own in method.by_part.items()]
    told = {part for part, own, rates in parts if any(rate not in rates for rate in own)}
    cells += [
        WinCell(method.name, part, rate)
        for method in evidence.methods
        for part, own in method.by_part.items()
        if part in told
        for rate in own
    ]
    known = {method.name for method in evidence.methods}
    for judge, tallies in judged_tallies(evidence):
        for opponent, against in _OPPONENTS.items():
            for tally in tallies:
                name = re.sub(f"^{SYSTEM_BEST_OF}", BEST_OF, tally.first)
                if (name in known or name != tally.first) and tally.second == opponent and tally.score is not None:
                    ties = 0.0 if tally.tie is None else tally.tie.estimate
                    cells.append(WinCell(name, judge, WinRate(against, tally.score, ties, tally.num_judgements, 0)))
    filled = dict.fromkeys(cell.method for cell in cells)
    methods = [method.name for method in evidence.methods if method.name in filled]
    methods += [name for name in filled if name not in methods]
    return WinTable(cells, methods, list(dict.fromkeys(cell.column for cell in cells)))


def category_table(evidence: Evidence) -> WinTable:
    """The scorer's win rates of every method on the prompts of each category, which stands where a judge would."""
    cells = [
        WinCell(method.name, category, rate)
        for method in evidence.methods
        for category, rates in method.by_category.items()
        for rate in rates
    ]
    columns = sorted({cell.column for cell in cells}, key=lambda column: column[::-1])
    return WinTable(cells, list(dict.fromkeys(cell.method for cell in cells)), columns)


def write_win_table(table: WinTable, folder: Path, name: str, caption: str) -> list[Path]:
    """Write `name`.md, .csv and .json; return the paths."""
    paths = [folder / f"{name}.{kind}" for kind in ("md", "csv", "json")]
    write_text(paths[0], f"{as_markdown(table)}\n{caption}\n")
    rows = [_plain(cell) for cell in table.cells]
    write_text(paths[1], csv_text([rows[0], *(row.values() for row in rows)]))
    write_json(paths[2], {"caption": caption, "cells": rows})
    return paths


def as_markdown(table: WinTable) -> str:
    """One row per method, `win rate % [low, high] (n prompts)` in a cell, a column's best in bold."""
    heads = ["method", *(f"{by}: against {against}" for by, against in table.columns)]
    leading = {column: table.best(column, _share) for column in table.columns}

    def text(name: str, column: tuple[str, str]) -> str:
        cell = table.cell(name, column)
        told = "–" if cell is None else f"{_share(cell.won.rate)} (n {cell.won.rate.num_prompts})"
        return f"**{told}**" if name in leading[column] else told

    rows = [[name, *(text(name, column) for column in table.columns)] for name in table.methods]
    return markdown(heads, rows, "---:")


def _plain(cell: WinCell) -> dict[str, Any]:
    """All its numbers, as shares in [0, 1]."""
    rate = cell.won.rate
    who = {"method": cell.method, "by": cell.by, "against": cell.won.opponent, "win_rate": rate.estimate}
    bounds = {"low": rate.low, "high": rate.high, "num_prompts": rate.num_prompts}
    equal = cell.won.at_equal_length
    ends = (None, None, None) if equal is None else (equal.estimate, equal.low, equal.high)
    length = dict(zip(("at_equal_length", "at_equal_length_low", "at_equal_length_high"), ends, strict=True))
    return {**who, **bounds, "num_pairs": cell.won.num_pairs, "ties": cell.won.ties, **length}


def _share(rate: Interval) -> str:
    text = f"{100 * rate.estimate:.1f}"
    if rate.low is None or rate.high is None:
        return text
    return f"{text} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


OVERALL = "overall"


def judged_tallies(evidence: Evidence) -> list[tuple[str, list[Tally]]]:
    """Every judge (a language model with its template, people of a study) with the overall tallies that have shares."""
    said = [
        (f"{judge.name}, template “{judge.template}”", [match_up.tally for match_up in judge.match_ups])
        for judge in evidence.judgements.judges
    ]
    said += [
        (f"people, study “{study.name}”", [tally for tally in study.tallies if tally.criterion == OVERALL])
        for study in evidence.judgements.studies
    ]
    kept = [(judge, [tally for tally in tallies if tally.win is not None]) for judge, tallies in said]
    return [(judge, tallies) for judge, tallies in kept if tallies]


def draw_verdicts(evidence: Evidence, looks: Mapping[str, Look], *, width: float) -> Figure | None:
    """A panel per judge, a bar per match-up: what the first wins, ties, what the second wins; None without any."""
    panels = judged_tallies(evidence)
    if not panels:
        return None
    heights = [len(tallies) for _, tallies in panels]
    figure = Figure(figsize=(width, 0.5 + sum(0.5 + 0.42 * count for count in heights)), layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=[count + 0.6 for count in heights])
    for place, (judge, tallies) in enumerate(panels):
        axes = figure.add_subplot(grid[place])
        axes.set_title(in_one_line(judge))
        _bars(axes, tallies, looks)
        axes.tick_params(labelbottom=place == len(panels) - 1)
    figure.axes[-1].set_xlabel("share of prompts: wins of the first · ties · wins of the second")
    return figure


def _bars(axes: Axes, tallies: Sequence[Tally], looks: Mapping[str, Look]) -> None:
    for row, tally in enumerate(tallies):
        assert tally.win is not None and tally.tie is not None and tally.lose is not None
        win, tie, lose = (share.estimate for share in (tally.win, tally.tie, tally.lose))
        first, second = _look_of(tally.first, looks), _look_of(tally.second, looks)
        axes.barh(row, win, height=0.6, color=first.color if first else LIGHT["ink"])
        axes.barh(row, tie, left=win, height=0.6, color=LIGHT["rule"])
        axes.barh(row, lose, left=1 - lose, height=0.6, color=second.color if second else LIGHT["muted"])
        if tally.win.low is not None and tally.win.high is not None:
            above = [row - 0.38, row - 0.38]
            axes.plot(tally.win.ends, above, color=LIGHT["ink"], linewidth=1.2, marker="|", markersize=5)
        shares = f"{100 * win:.0f} · {100 * tie:.0f} · {100 * lose:.0f}  (n = {tally.win.num_prompts})"
        axes.text(1.015, row, shares, va="center", fontsize=8)
    axes.set_yticks(range(len(tallies)), [in_one_line(f"{tally.first} – {tally.second}", 34) for tally in tallies])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(tallies) - 0.5, -0.6)
    axes.grid(False)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])


def _look_of(system: str, looks: Mapping[str, Look]) -> Look | None:
    """`METHOD@STEP` looks like its method."""
    return looks.get(system) or looks.get(system.partition("@")[0])


def in_one_line(text: str, most: int = 80) -> str:
    text = drawable(" ".join(text.split()))
    return text if len(text) <= most else text[: most - 1] + "…"
