"""The numbers of a judged match-up: `summary.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from exalign.evaluation.schema import Interval
from exalign.evaluation.statistics import mean_interval
from exalign.judging.llm.length_control import length_controlled_win_rate
from exalign.judging.llm.verdicts import Judgement, in_both_orders, together
from exalign.judging.tally import tally

SUMMARY_VERSION = 1
_SCORE = {"first": 1.0, "tie": 0.5, "second": 0.0}


def summarise(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Win, tie and lose of a match-up, and how far the judge can be trusted; JSON values, None where there is nothing.

    - `win`, `tie`, `lose`, `score` (win + tie/2): over the pairs with a readable verdict; intervals over prompts.
    - `length_controlled`: see `length_control`.
    - `flip_rate`: of the pairs that were asked about and readable in both orders, the share in which each order named
      another winner; `half_ties`: the share in which only one order was a tie. Both kinds count as ties.
    - `shown_first`: of all readable answers that named a winner, the share that named the answer shown first; ½ is no
      position bias.
    - `unreadable_pairs`, `unreadable_answers`, `unanswered`, `identical`: counts.
    - `tokens`: what the answers cost, and for how many the endpoint did not say.
    """
    verdicts, orders = together(judgements), in_both_orders(judgements)
    counted = tally(verdicts)[0] if verdicts else None
    return {
        "version": SUMMARY_VERSION,
        "pairs": len(judgements),
        **{name: _interval(getattr(counted, name, None)) for name in ("win", "tie", "lose", "score")},
        "length_controlled": _length_controlled(judgements),
        "flip_rate": _share([judgement.flipped for judgement in judgements]),
        "half_ties": _share([judgement.half_tie for judgement in judgements]),
        "shown_first": _share(
            [c.shown_verdict == "left" if c.shown_verdict in ("left", "right") else None for c in orders]
        ),
        "unreadable_pairs": sum(c.verdict == "unreadable" for c in verdicts),
        "unreadable_answers": sum(c.verdict == "unreadable" for c in orders),
        "unanswered": sum(judgement.verdict is None for judgement in judgements),
        "identical": sum(judgement.pair.identical for judgement in judgements),
        "tokens": {
            "prompt": sum(c.prompt_tokens or 0 for c in orders),
            "completion": sum(c.completion_tokens or 0 for c in orders),
            "answers_without_usage": sum(c.prompt_tokens is None or c.completion_tokens is None for c in orders),
        },
    }


def _length_controlled(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    rows = [
        (_SCORE[judgement.verdict.verdict], len(judgement.pair.first_text) - len(judgement.pair.second_text))
        for judgement in judgements
        if judgement.verdict is not None and judgement.verdict.verdict in _SCORE
    ]
    if not rows:
        return None
    scores, differences = np.array(rows, dtype=np.float64).T
    return asdict(length_controlled_win_rate(scores, differences))


def _share(values: Sequence[bool | None]) -> dict[str, Any] | None:
    known = [float(value) for value in values if value is not None]
    return _interval(mean_interval(np.array(known))) if known else None


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    return asdict(interval) if interval is not None else None
