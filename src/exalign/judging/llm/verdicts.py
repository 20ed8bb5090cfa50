"""From answers to verdicts: both orders of a pair make one verdict, and say how much the order mattered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from exalign.judging.comparison import Comparison, Side, Verdict, verdict_from_shown
from exalign.judging.llm.exchanges import Answer
from exalign.judging.llm.instructions import read_verdict
from exalign.judging.llm.pairs import Pair

ORDERS: tuple[Side, ...] = get_args(Side)
"""Who is shown as A: first one system, then the other."""
NOT_ASKED = "identical answers, not asked"
Keys = Mapping[Side, str]
"""The keys of a pair's two questions, by who is shown as A."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A pair and what the judge said: a comparison for each order that was answered, and the verdict of both together.

    `verdict` is None while an order is unanswered.
    """

    pair: Pair
    orders: tuple[Comparison, ...]
    verdict: Comparison | None

    @property
    def flipped(self) -> bool | None:
        """Each order named another winner; None where an order is missing, unreadable or was not asked."""
        said = self.readable
        return None if said is None else set(said) == {"first", "second"}

    @property
    def half_tie(self) -> bool | None:
        """One order was a tie and the other was not."""
        said = self.readable
        return None if said is None else "tie" in said and len(set(said)) == 2

    @property
    def readable(self) -> tuple[Verdict, ...] | None:
        said = tuple(comparison.verdict for comparison in self.orders)
        return said if len(said) == 2 and "unreadable" not in said else None


def agreed(first: Verdict, second: Verdict) -> Verdict:
    """The verdict of two orders: what both say, a tie where they differ, unreadable where either is.

    >>> agreed("first", "first"), agreed("first", "second"), agreed("tie", "second"), agreed("first", "unreadable")
    ('first', 'tie', 'tie', 'unreadable')
    """
    if "unreadable" in (first, second):
        return "unreadable"
    return first if first == second else "tie"


def judge_pair(pair: Pair, keys: Keys, answers: Mapping[str, Answer], judge: str) -> Judgement:
    """Read the answers to both of a pair's questions."""
    if pair.identical:
        return Judgement(pair, (), pair.judged(judge, "tie", left=None, comment=NOT_ASKED))
    orders = tuple(_judged(pair, side, answers[keys[side]], judge) for side in ORDERS if keys[side] in answers)
    if len(orders) < 2:
        return Judgement(pair, orders, None)
    verdict = agreed(orders[0].verdict, orders[1].verdict)
    return Judgement(pair, orders, pair.judged(judge, verdict, left=None))


def _judged(pair: Pair, left: Side, answer: Answer, judge: str) -> Comparison:
    verdict = verdict_from_shown(read_verdict(answer.text), left=left)
    return replace(
        pair.judged(judge, verdict, left=left),
        answer=answer.text,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        seconds=answer.seconds,
        time=answer.time,
    )


def in_both_orders(judgements: Iterable[Judgement]) -> list[Comparison]:
    """Every answer as a comparison, two for a pair that was asked about."""
    return [comparison for judgement in judgements for comparison in judgement.orders]


def together(judgements: Iterable[Judgement]) -> list[Comparison]:
    """One comparison for each pair whose orders are both answered."""
    return [judgement.verdict for judgement in judgements if judgement.verdict is not None]
