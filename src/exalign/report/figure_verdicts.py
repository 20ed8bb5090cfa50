"""Wins, ties and losses of judged match-ups (Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exalign.evaluation.schema import Evidence, Tally
from exalign.report.labels import drawable
from exalign.report.style import LIGHT, Look
from exalign.report.wording import within_a_share

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
