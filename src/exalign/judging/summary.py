"""From answers to numbers: both orders of a pair make one verdict, a match-up's verdicts its `summary.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from exalign.evaluation.schema import Interval, Tally
from exalign.evaluation.statistics import BOOTSTRAP, LengthControl, length_controlled_win_rate
from exalign.judging.agreement import mean_by_prompt, tally
from exalign.judging.comparisons import Comparison, Pair, Side, Verdict, verdict_from_shown
from exalign.judging.exchanges import Answer
from exalign.judging.instructions import read_verdict

SUMMARY_VERSION = 1
ORDERS: tuple[Side, ...] = get_args(Side)
"""Who is shown as A: first one system, then the other."""
NOT_ASKED = "identical answers, not asked"
CUT_OFF, REFUSED, NO_LINE = "cut off", "refused", "no verdict line"
"""Why an answer is unreadable; its comparison says so in `comment`."""
Keys = Mapping[Side, str]
"""The keys of a pair's two questions, by who is shown as A."""
_SCORE = {"first": 1.0, "tie": 0.5, "second": 0.0}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judge said of a pair: a comparison for each order that was answered, and the verdict of both together.

    `verdict` is None while an order is unanswered.
    """

    orders: tuple[Comparison, ...]
    verdict: Comparison | None


def agreed(first: Verdict, second: Verdict) -> Verdict:
    """The verdict of two orders.

    >>> agreed("first", "first"), agreed("first", "second"), agreed("tie", "second"), agreed("first", "unreadable")
    ('first', 'tie', 'tie', 'unreadable')
    """
    if "unreadable" in (first, second):
        return "unreadable"
    return first if first == second else "tie"


def judge_pair(pair: Pair, keys: Keys, answers: Mapping[str, Answer], judge: str) -> Judgement:
    if pair.identical:
        return Judgement((), replace(pair.judged(judge, "tie"), comment=NOT_ASKED))
    orders = tuple(_judged(pair, side, answers[keys[side]], judge) for side in ORDERS if keys[side] in answers)
    if len(orders) < 2:
        return Judgement(orders, None)
    return Judgement(orders, pair.judged(judge, agreed(orders[0].verdict, orders[1].verdict)))


def _judged(pair: Pair, left: Side, answer: Answer, judge: str) -> Comparison:
    shown = read_verdict(answer.text)
    problem = NO_LINE if shown == "unreadable" else None
    if answer.refused or answer.finish_reason == "content_filter":
        problem = REFUSED
    elif answer.finish_reason == "length":  # what is missing could have taken back what is there
        problem = CUT_OFF
    cost = {name: getattr(answer, name) for name in ("prompt_tokens", "completion_tokens", "seconds", "time")}
    verdict = verdict_from_shown("unreadable" if problem else shown, left=left)
    return replace(pair.judged(judge, verdict, left=left), comment=problem, answer=answer.text, **cost)


def num_measured(verdicts: Iterable[Comparison]) -> int:
    """How many verdicts say something about the systems: readable ones on answers that differ.

    Where there is none there is no win rate: pairs of the same text alone, ties that nobody was asked about, make none.
    """
    return sum(verdict.verdict != "unreadable" and not verdict.identical for verdict in verdicts)


def summarise(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Win, tie and lose of a match-up, and how far the judge can be trusted; None where there is nothing.

    Where a judge is graded on several match-ups, nothing is said of any one of them.

    - `win`, `tie`, `lose`, `score` (win + tie/2): over the pairs with a readable verdict; intervals over prompts.
    - `length_controlled`: see `LengthControl`.
    - `flip_rate`: of the pairs that were asked about and readable in both orders, the share in which each order named
      another winner; `half_ties`: the share in which only one order was a tie. Both kinds count as ties.
    - `shown_first`: of all readable answers that named a winner, the share that named the answer shown first; ½ is no
      position bias.
    - `measured_pairs`, `unreadable_pairs`, `answers`, `unreadable_answers`, `unanswered`, `identical`: counts;
      `unreadable_because`: how many answers for each cause, and `unreadable_example`: the end of one without a verdict.
    - `tokens`: what the answers cost, and for how many the endpoint did not say.
    """
    verdicts = [judgement.verdict for judgement in judgements if judgement.verdict is not None]
    orders = [comparison for judgement in judgements for comparison in judgement.orders]
    measured = num_measured(verdicts)
    tallies = tally(verdicts) if measured else []
    counted = tallies[0] if len(tallies) == 1 else None
    unreadable = [c for c in orders if c.verdict == "unreadable"]
    pairs = [judgement.orders for judgement in judgements if len(judgement.orders) == 2]
    said = [(first.prompt_id, {first.verdict, second.verdict}) for first, second in pairs]
    both = [(prompt, verdicts) for prompt, verdicts in said if "unreadable" not in verdicts]
    return {
        "version": SUMMARY_VERSION,
        "pairs": len(judgements),
        **{name: getattr(counted, name, None) for name in ("win", "tie", "lose", "score")},
        "length_controlled": _length_controlled(verdicts, counted) if counted else None,
        "flip_rate": mean_by_prompt((prompt, verdicts == {"first", "second"}) for prompt, verdicts in both),
        "half_ties": mean_by_prompt((prompt, "tie" in verdicts and len(verdicts) == 2) for prompt, verdicts in both),
        "shown_first": _shown_first(orders),
        "measured_pairs": measured,
        "unreadable_pairs": sum(c.verdict == "unreadable" for c in verdicts),
        "answers": len(orders),
        "unreadable_answers": len(unreadable),
        "unreadable_because": Counter(c.comment for c in unreadable),
        "unreadable_example": next((c.answer[-80:] for c in unreadable if c.comment == NO_LINE and c.answer), None),
        "unanswered": sum(judgement.verdict is None for judgement in judgements),
        "identical": sum(verdict.identical for verdict in verdicts),
        "tokens": {
            "prompt": sum(c.prompt_tokens or 0 for c in orders),
            "completion": sum(c.completion_tokens or 0 for c in orders),
            "answers_without_usage": sum(c.prompt_tokens is None or c.completion_tokens is None for c in orders),
        },
    }


def _length_controlled(verdicts: Sequence[Comparison], counted: Tally) -> LengthControl:
    told = [c.oriented(counted.first, counted.second) for c in verdicts if c.verdict in _SCORE]
    scores = np.array([_SCORE[c.verdict] for c in told])
    longer = np.array([len(c.first_text) - len(c.second_text) for c in told], dtype=np.float64)
    return length_controlled_win_rate(scores, longer, np.unique([c.prompt_id for c in told], return_inverse=True)[1])


def _shown_first(orders: Sequence[Comparison]) -> Interval | None:
    """Both orders of a pair, and all pairs of a prompt, are one piece of evidence."""
    named = [(c.prompt_id, c.shown_verdict == "left") for c in orders if c.shown_verdict in ("left", "right")]
    if not named:
        return None
    prompts, sides = zip(*named, strict=True)
    numbers = np.unique(prompts, return_inverse=True)[1]
    sizes = np.bincount(numbers).astype(np.float64)
    return BOOTSTRAP.share(np.bincount(numbers, weights=sides) / sizes, sizes)
