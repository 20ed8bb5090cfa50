"""The checkpoint to ship and the warnings, on numbers made for it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from exalign.evaluation.pool import OPTIMUM
from exalign.evaluation.schema import (
    BestOfN,
    DensityCurve,
    DensityRatios,
    FrontierPoint,
    HeldOut,
    Interval,
    Judgements,
    MethodEvidence,
    ModelJudge,
    ModelMatchUp,
    Optimum,
    OptimumPoint,
    PromptDensity,
    Tally,
    WinRate,
)
from exalign.evaluation.statistics import BOOTSTRAP
from exalign.evaluation.verdict import misled, own_sample_warnings, scorer_accuracy, verdict, warnings

SFT = FrontierPoint(0, None, Interval(0, 0, 0, 9), None, 9, tokens=16.0, finished=0.9, repetition=0.02)


def span(estimate: float, half: float = 0.1) -> Interval:
    return Interval(estimate, estimate - half, estimate + half, 100)


def point(step: int, gain: Interval | None = None, kl: float = 1.0, **more: Any) -> FrontierPoint:
    reward = None if gain is None else span(gain.estimate + 0.5)
    values: dict[str, Any] = {"tokens": 16.0, "finished": 0.9, "repetition": 0.02, **more}
    return FrontierPoint(step, reward, span(kl), None, 400, gain=gain, **values)


def method(name: str, *points: FrontierPoint) -> MethodEvidence:
    return MethodEvidence(name, "exo", "reward", True, list(points), [])


def said(shown: FrontierPoint, **parts: Any) -> str:
    values = {"optimum": None, "density": None, "judgements": Judgements(), **parts}
    return " ".join(warnings(SFT, [("exo", shown)], **values))


def test_without_a_budget_the_highest_lower_bound_of_the_gain_wins() -> None:
    """1.0 ± 0.1 is at least 0.9, 1.2 ± 0.5 perhaps only 0.7."""
    found = verdict([method("wide", point(9, span(1.2, 0.5))), method("sure", point(4, span(1.0)))], None)
    assert found is not None
    assert (found.method, found.step, found.within, found.certain) == ("sure", 4, None, True)


def test_without_a_budget_a_kl_that_is_wasted_is_passed_over() -> None:
    """The best of 4 has 2.0 ± 0.1 at 0.6 nats: more than `far` has at 9, which is 1.7 ± 0.1, and less than `near`."""
    best = [BestOfN(n, span(reward), kl) for n, reward, kl in ((2, 1.0, 0.2), (4, 2.0, 0.6))]
    far, near = method("far", point(9, span(1.2), kl=9.0)), method("near", point(4, span(1.0), kl=1.0))
    found = verdict([far, near], None, best)
    assert found is not None and (found.method, found.passed_over) == ("near", 1)
    alone = verdict([far], None, best)
    assert alone is not None and (alone.method, alone.passed_over) == ("far", 0)
    within = verdict([far, near], 10.0, best)  # who names a budget has said what it may cost
    assert within is not None and (within.method, within.passed_over) == ("far", 0)


def test_with_a_budget_the_most_reward_within_it_wins() -> None:
    methods = [method("a", point(1, span(0.5), kl=0.5), point(2, span(2.0), kl=3.0)), method("b", point(1, span(0.6)))]
    found = verdict(methods, 1.0)
    assert found is not None and (found.method, found.step, found.within) == ("b", 1, 1.0)
    assert verdict(methods, 0.1) is None


def test_a_gain_that_is_sure_is_shipped_before_a_larger_one_that_may_be_none() -> None:
    """0.5 ± 0.65 may be none, 0.4 ± 0.03 is not."""
    methods = [method("exo", point(1, span(0.5, 0.65))), method("dpo", point(1, span(0.4, 0.03)))]
    for budget in (None, 1.5):
        found = verdict(methods, budget)
        assert found is not None and (found.method, found.certain, found.among) == ("dpo", True, 2)


def test_the_best_of_many_is_sure_only_where_it_would_be_as_one_of_them() -> None:
    """A gain of 2.4 standard errors: enough for one checkpoint, not for the best of sixteen (Bonferroni: 2.96)."""
    alone, others = point(1, span(0.24, 0.196)), [point(step, span(0.0, 0.196)) for step in range(2, 17)]
    for points, certain in (([alone], True), ([alone, *others], False)):
        found = verdict([method("a", *points)], None)
        assert found is not None and (found.step, found.certain) == (1, certain)


def test_the_best_of_equal_policies_is_shipped_as_seldom_as_is_promised() -> None:
    """Of 16 policies that are π_sft one is `certain` in at most 2.5 % of the cases, rather than in a third."""
    draws = np.random.default_rng(0).normal(size=(400, 16, 128))
    shipped = 0
    for case in draws:
        found = verdict([method("a", *(point(i + 1, BOOTSTRAP.mean(gain)) for i, gain in enumerate(case)))], None)
        shipped += found is not None and found.certain
    assert shipped <= 0.025 * 400 + 3 * math.sqrt(400 * 0.025)


def test_a_scorer_with_the_wrong_sign_is_called_that() -> None:
    told, doubt = scorer_accuracy({"pairs_scored": 400, "pairs_scored_right": 40})
    assert not told and doubt[0].endswith(
        "10 % [7, 13] of 400 pairs: as a reward does whose sign is the wrong way round."
    )
    told, doubt = scorer_accuracy({"pairs_scored": 40, "pairs_scored_right": 20})
    assert not told and "may be chance" in doubt[0]
    told, doubt = scorer_accuracy({"pairs_scored by len": 400, "pairs_scored_right by len": 40})
    assert not told and "wrong way round" in doubt[0]


def test_a_gain_that_may_be_none_is_not_certain() -> None:
    for gain in (span(0.05), span(-0.3), Interval(0.5, None, None, 1)):
        found = verdict([method("a", point(1, gain))], None)
        assert found is not None and not found.certain


def test_accuracy_counts_from_one_half() -> None:
    def read(accuracy: Interval) -> FrontierPoint:
        return point(1, held_out=HeldOut(accuracy, span(1.0), span(0.0), span(-1.0)))

    for accuracy, certain in ((span(0.7), True), (span(0.55), False)):
        found = verdict([method("a", read(accuracy))], None)
        assert found is not None and found.certain == certain
    assert verdict([method("a", point(1))], None) is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tokens": 12.0}, "from 16.0 tokens to: exo 12.0"),
        ({"tokens": 20.0}, "from 16.0 tokens to: exo 20.0"),
        ({"repetition": 0.07}, "repeated 4-grams): exo 7 %; the supervised policy 2 %"),
        ({"finished": 0.8}, "cut at the limit of tokens: exo 20 %; the supervised policy 10 %"),
    ],
)
def test_a_change_that_matters_is_warned_of(more: dict[str, float], words: str) -> None:
    assert words in said(point(1, span(1.0), **more))


def test_wins_that_length_may_explain_are_warned_of() -> None:
    won = WinRate("SFT", span(0.7), 0.0, 400, 0)
    by_length = replace(won, at_equal_length=span(0.55))
    assert "exo 70 %, at equal length 55 %" in said(point(4, span(1.0), win_vs_sft=by_length))
    for clear in (won, replace(won, at_equal_length=span(0.65)), replace(by_length, rate=span(0.55))):
        assert "at equal length" not in said(point(4, span(1.0), win_vs_sft=clear))


def test_a_change_that_may_be_chance_is_not() -> None:
    for name, value, change in (("tokens", 12.0, -4.0), ("repetition", 0.07, 0.05), ("finished", 0.8, -0.1)):
        values = {name: value}
        assert said(point(1, span(1.0), **values, changes={name: span(change, abs(change) / 2)}))
        assert said(point(1, span(1.0), **values, changes={name: span(change, 2 * abs(change))})) == ""
        assert said(point(1, span(1.0), **values, changes={name: Interval(change, None, None, 1)})) == ""


def test_what_hardly_changed_is_not() -> None:
    assert said(point(1, span(1.0), tokens=12.1, repetition=0.06, finished=0.86)) == ""
    assert said(point(1, span(1.0), tokens=None, repetition=None, finished=None)) == ""


def test_a_kl_that_samples_cannot_measure_is_warned_of() -> None:
    wide = FrontierPoint(1, None, span(2.0, 1.1), None, 4)
    assert "The KL of exo is more than its samples can measure: 2.0 nats, somewhere from 0.9 to 3.1." in said(wide)
    assert said(FrontierPoint(1, None, span(2.0, 0.9), None, 4)) == ""
    assert "somewhere from 0.0 to 1.6." in said(FrontierPoint(1, None, Interval(0.8, -0.01, 1.6, 9), None, 4))
    assert "somewhere from −0.2 to 1.6." in said(FrontierPoint(1, None, Interval(0.8, -0.2, 1.6, 9), None, 4))


def test_a_policy_that_the_best_of_few_samples_beats_nearby_is_warned_of() -> None:
    best = [BestOfN(n, span(reward), kl) for n, reward, kl in ((2, 1.0, 0.2), (4, 2.0, 0.6), (8, 2.6, 1.2))]
    shown = point(1, span(1.2), kl=2.5)  # its reward is 1.7 at most 1.8
    assert "exo is 2.5 nats away and has less reward than the best of 4 samples" in said(shown, best_of_n=best)
    assert "less reward than the best of 4 samples" in said(point(1, span(1.2), kl=1.3), best_of_n=best)
    assert said(point(1, span(1.2), kl=1.1), best_of_n=best) == ""
    assert said(point(1, span(2.2), kl=2.5), best_of_n=best) == ""
    worse = said(shown, best_of_n=[BestOfN(1, span(2.4), 0.0)])
    assert "has less reward than the supervised policy itself: its KL buys nothing" in worse


def test_a_training_reward_that_leads_nowhere_is_warned_of() -> None:
    (far,) = misled(1.2, span(0.28, 0.08))
    assert "at 1.2 nats the optimum for it has 28 % [20, 36] of what could be gained" in far
    assert misled(1.2, span(0.45, 0.08)) == []
    assert "has 0 % [−12, 12]" in misled(1.2, span(-0.004, 0.12))[0]


def test_few_effective_samples_are_warned_of() -> None:
    reliable, beyond = (OptimumPoint(1.0, span(1), span(kl), ess, ess >= 10) for kl, ess in ((0.8, 20.0), (2.0, 4.0)))
    optimum = Optimum([reliable, beyond], 8, 64, 64, 10.0)
    assert "fewer than 10 effective samples beyond a KL of 0.8 nats" in said(point(1, span(1.0)), optimum=optimum)
    assert said(point(1, span(1.0), kl=0.7), optimum=optimum) == ""
    at_its_end = replace(optimum, points=[reliable])  # of two rewards, the higher one
    assert said(point(1, span(1.0)), optimum=at_its_end) == ""
    curves = [DensityCurve("exo", [1.0], [1.0], [1.0], ess) for ess in (3.0, 30.0)]
    curves.append(DensityCurve(OPTIMUM, [1.0], [1.0], [1.0], 3.0))  # is not drawn, so nothing to be warned of
    density = DensityRatios([PromptDensity("p", "prompt", [1.0], [1.0], 1.0, curves)])
    assert "1 of the 2 curves of density ratios stand" in said(point(1, span(1.0)), density=density)


def test_a_judge_who_disagrees_with_the_reward_is_heard() -> None:
    def judged(score: Interval) -> Judgements:
        tally = Tally("exo", "sft", "overall", score, None, None, score, 90, 0)
        match_up = ModelMatchUp(tally, 90, 0, 0, None, None, None, None, 0, 0, 0, 0)
        return Judgements(judges=[ModelJudge("a judge", "plain", [match_up])])

    assert "rose, but a judge prefers" in said(point(1, span(1.0)), judgements=judged(span(0.3)))
    assert said(point(1, span(1.0)), judgements=judged(span(0.45))) == ""
    assert said(point(1, span(0.0)), judgements=judged(span(0.3))) == ""


def test_a_correction_on_few_samples_and_prompts_of_one_reward_are_warned_of() -> None:
    few, equal = own_sample_warnings(
        "a", {"effective_samples": [4.0, 1.4, None, 1.0, 1.5], "equal_rewards": [0.4, 0.8]}
    )
    assert "a: for 50 % of the training the correction" in few
    assert "a: 60 % of the prompts had completions of one and the same reward" in equal
    assert not [*own_sample_warnings("a", {"effective_samples": [1.5], "equal_rewards": [0.4], "loss": [0.1]})]
