"""The bar of a judged match-up: wins from the left, losses from the right, ties between them."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from exalign.evaluation.schema import Interval, Tally
from exalign.report.style import Look
from exalign.report.wording import within_a_share

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
    win = _WIN.format(*_look(tally.first, looks, "ink"), _percent(tally.win.estimate))
    lose = _LOSE.format(*_look(tally.second, looks, "muted"), _percent(tally.lose.estimate))
    brackets = _bracket("above", tally.win) + _bracket("below", tally.lose)
    return Markup('<div class="verdicts" aria-hidden="true">{}</div>').format(win + lose + brackets)


def _look(system: str, looks: Mapping[str, Look], otherwise: str) -> tuple[str, str]:
    """Class and colour of a system; `METHOD@STEP` looks like its method."""
    look = looks.get(system) or looks.get(system.partition("@")[0])
    return ("", otherwise) if look is None else (" hollow" if look.hollow else "", look.name)


def _bracket(place: str, interval: Interval) -> Markup:
    if interval.low is None or interval.high is None:
        return Markup("")
    return _BOUNDS.format(place, _percent(interval.low), _percent(interval.high))


def _percent(share: float) -> str:
    return f"{100 * within_a_share(share):.1f}%"
