"""Who won: win rates by the run's scorer and by every judge (Tables 1 and 2), judged match-ups as bars (Figure 4)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exalign.evaluation.run_folder import BEST_OF as SYSTEM_BEST_OF
from exalign.evaluation.schema import Evidence, Interval, Tally, WinRate
from exalign.report.style import LIGHT, Look, drawable
from exalign.report.wording import best, percent, visible, within_a_share
from exalign.spreadsheet import csv_text
from exalign.storage import write_json, write_text

SCORER, BEST_OF = "scorer", "best of "
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

    def best(self, column: tuple[str, str], shown: Callable[[Interval], str] = percent) -> set[str]:
        """The methods with the highest win rate of a column, as it is `shown`; best of N is none of them."""
        trained = [name for name in self.methods if not name.startswith(BEST_OF)]
        cells = {name: cell.rate for name in trained if (cell := self.cell(name, column))}
        return best({name: (rate.estimate, shown(rate)) for name, rate in cells.items()})


def win_table(evidence: Evidence) -> WinTable:
    """Methods in the order of the evidence, then the best of the largest N; the scorer's columns, then the judges'.

    A judge's cell is of a method at its last checkpoint, judged against samples of SFT or the reference texts.
    """
    rates = [(method.name, rate) for method in evidence.methods for rate in method.win_rates]
    if evidence.best_of_n:
        most = evidence.best_of_n[-1]
        rates += [(f"{BEST_OF}{most.n}", rate) for rate in most.win_rates]
    cells = [_by_scorer(name, rate) for name, rate in rates]
    known = {method.name for method in evidence.methods}
    for judge, tallies in judged_tallies(evidence):
        for opponent, against in _OPPONENTS.items():
            for tally in tallies:
                name = re.sub(f"^{SYSTEM_BEST_OF}", BEST_OF, tally.first)
                if (name in known or name != tally.first) and tally.second == opponent and tally.score is not None:
                    ties = 0.0 if tally.tie is None else tally.tie.estimate
                    cells.append(WinCell(name, judge, against, tally.score, ties, tally.num_judgements))
    methods = dict.fromkeys([*(method.name for method in evidence.methods), *(cell.method for cell in cells)])
    filled = {cell.method for cell in cells}
    return WinTable(
        methods=[name for name in methods if name in filled],
        columns=list(dict.fromkeys((cell.by, cell.against) for cell in cells)),
        cells={(cell.method, cell.by, cell.against): cell for cell in cells},
    )


def category_table(evidence: Evidence) -> WinTable:
    """The scorer's win rates of every method on the prompts of each category, which stands where a judge would."""
    cells = [
        WinCell(method.name, category, rate.opponent, rate.rate, rate.ties, rate.num_pairs)
        for method in evidence.methods
        for category, rates in method.by_category.items()
        for rate in rates
    ]
    return WinTable(
        methods=list(dict.fromkeys(cell.method for cell in cells)),
        columns=sorted({(cell.by, cell.against) for cell in cells}, key=lambda column: column[::-1]),
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
    """One row per method, `win rate % [low, high] (n prompts)` in a cell, a column's best in bold."""
    heads = ["method", *(f"{by}: against {against}" for by, against in table.columns)]
    leading = {column: table.best(column, _share) for column in table.columns}

    def text(name: str, column: tuple[str, str]) -> str:
        cell = table.cell(name, column)
        told = "–" if cell is None else f"{_share(cell.rate)} (n {cell.rate.num_prompts})"
        return f"**{told}**" if name in leading[column] else told

    rows = [[name, *(text(name, column) for column in table.columns)] for name in table.methods]
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


def _share(rate: Interval) -> str:
    text = f"{100 * rate.estimate:.1f}"
    if rate.low is None or rate.high is None:
        return text
    return f"{text} [{100 * within_a_share(rate.low):.1f}, {100 * within_a_share(rate.high):.1f}]"


def _escape(text: str) -> str:
    return visible(" ".join(text.split())).replace("|", r"\|").replace("<", "&lt;")


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
        axes.set_title(_cut(judge))
        _bars(axes, tallies, looks)
        axes.tick_params(labelbottom=place == len(panels) - 1)
    figure.axes[-1].set_xlabel("share of prompts: wins of the first · ties · wins of the second")
    return figure


def _bars(axes: Axes, tallies: Sequence[Tally], looks: Mapping[str, Look]) -> None:
    for row, tally in enumerate(tallies):
        assert tally.win is not None and tally.lose is not None
        win, lose = tally.win.estimate, tally.lose.estimate
        axes.barh(row, win, height=0.6, color=_color(tally.first, looks, "ink"))
        axes.barh(row, 1 - win - lose, left=win, height=0.6, color=LIGHT["rule"])
        axes.barh(row, lose, left=1 - lose, height=0.6, color=_color(tally.second, looks, "muted"))
        if tally.win.low is not None and tally.win.high is not None:
            ends = [within_a_share(tally.win.low), within_a_share(tally.win.high)]
            axes.plot(ends, [row - 0.38, row - 0.38], color=LIGHT["ink"], linewidth=1.2, marker="|", markersize=5)
        shares = f"{100 * win:.0f} · {100 * (1 - win - lose):.0f} · {100 * lose:.0f}  (n = {tally.win.num_prompts})"
        axes.text(1.015, row, shares, va="center", fontsize=8)
    axes.set_yticks(range(len(tallies)), [_cut(f"{tally.first} – {tally.second}", 34) for tally in tallies])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(tallies) - 0.5, -0.6)
    axes.grid(False)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])


def _color(system: str, looks: Mapping[str, Look], otherwise: str) -> str:
    look = looks.get(system) or looks.get(system.partition("@")[0])
    return LIGHT[otherwise] if look is None else look.color


def _cut(text: str, most: int = 80) -> str:
    text = drawable(" ".join(text.split()))
    return text if len(text) <= most else text[: most - 1] + "…"


_WIN = Markup('<i class="win{}" style="--c: var(--{}); --share: {}"></i>')
_LOSE = Markup('<i class="lose{}" style="--c: var(--{}); --share: {}"></i>')
_BOUNDS = Markup('<b class="{}" style="--low: {}; --high: {}"></b>')


def verdict_bar(tally: Tally, looks: Mapping[str, Look]) -> Markup:
    """The bar with each side in its system's colour, hatched for a preference target; nothing without verdicts.

    A bracket above spans the interval of the wins, one below that of the losses. The numbers stand beside the bar as
    text, so it is hidden from screen readers.
    """
    if tally.win is None or tally.lose is None:
        return Markup("")
    win = _WIN.format(*_look_of(tally.first, looks, "ink"), _percent(tally.win.estimate))
    lose = _LOSE.format(*_look_of(tally.second, looks, "muted"), _percent(tally.lose.estimate))
    brackets = _bracket("above", tally.win) + _bracket("below", tally.lose)
    return Markup('<div class="verdicts" aria-hidden="true">{}</div>').format(win + lose + brackets)


def _look_of(system: str, looks: Mapping[str, Look], otherwise: str) -> tuple[str, str]:
    """Class and colour of a system; `METHOD@STEP` looks like its method."""
    look = looks.get(system) or looks.get(system.partition("@")[0])
    return ("", otherwise) if look is None else (" hollow" if look.hollow else "", look.name)


def _bracket(place: str, interval: Interval) -> Markup:
    if interval.low is None or interval.high is None:
        return Markup("")
    return _BOUNDS.format(place, _percent(interval.low), _percent(interval.high))


def _percent(share: float) -> str:
    return f"{100 * within_a_share(share):.1f}%"
