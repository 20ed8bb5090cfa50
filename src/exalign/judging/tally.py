"""Win, tie and lose per match-up, with intervals in which the prompt is the unit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from exalign.evaluation.schema import Interval, Tally
from exalign.evaluation.statistics import mean_interval
from exalign.judging.comparison import Comparison, Verdict

OVERALL = "overall"


def verdict_on(comparison: Comparison, criterion: str) -> Verdict | None:
    """The overall verdict, or the one for a criterion; None where the judge left the criterion open."""
    return comparison.verdict if criterion == OVERALL else comparison.criteria.get(criterion)


def tally(comparisons: Iterable[Comparison], criterion: str = OVERALL) -> list[Tally]:
    """One `Tally` per match-up, in the order and orientation in which match-ups first occur.

    >>> from exalign.judging.comparison import Comparison
    >>> judged = [Comparison(str(i), "Hi", "exo", "sft", "a", "b", "ann", verdict)
    ...           for i, verdict in enumerate(["first", "first", "tie", "second"])]
    >>> [(t.first, t.win.estimate, t.tie.estimate, t.score.estimate) for t in tally(judged)]
    [('exo', 0.5, 0.25, 0.625)]
    """
    match_ups: dict[frozenset[str], tuple[str, str]] = {}
    verdicts: dict[tuple[str, str], dict[str, list[Verdict]]] = {}
    unreadable: dict[tuple[str, str], int] = defaultdict(int)
    for comparison in comparisons:
        systems = comparison.first, comparison.second
        names = match_ups.setdefault(frozenset(systems), systems)
        by_prompt = verdicts.setdefault(names, defaultdict(list))
        verdict = verdict_on(comparison.oriented(*names), criterion)
        if verdict == "unreadable":
            unreadable[names] += 1
        elif verdict is not None:
            by_prompt[comparison.prompt_id].append(verdict)
    return [_tally(names, criterion, verdicts[names], unreadable[names]) for names in verdicts]


def _tally(names: tuple[str, str], criterion: str, by_prompt: dict[str, list[Verdict]], unreadable: int) -> Tally:
    def share(verdict: Verdict) -> np.ndarray:
        return np.array([np.mean([v == verdict for v in values]) for values in by_prompt.values()])

    win, tie, lose = share("first"), share("tie"), share("second")
    judgements = sum(map(len, by_prompt.values()))
    return Tally(
        *names,
        criterion,
        win=_interval(win),
        tie=_interval(tie),
        lose=_interval(lose),
        score=_interval(win + tie / 2),
        num_judgements=judgements,
        unreadable=unreadable,
    )


def _interval(shares: np.ndarray) -> Interval | None:
    return mean_interval(shares) if len(shares) else None
