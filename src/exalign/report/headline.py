"""What the run found, in plain words, as the numbers have it: who is ahead at equal KL, and whether that is certain."""

from __future__ import annotations

from dataclasses import dataclass

from exalign.evaluation.schema import Comparison, EqualKL, Evidence, Interval, MethodEvidence
from exalign.report.wording import interval, number


@dataclass(frozen=True)
class Headline:
    """A title and a few sentences."""

    title: str
    sentences: list[str]


def headline(evidence: Evidence) -> Headline:
    """The headline of a run. A method is called ahead only where the interval of its lead excludes 0."""
    evaluated = [method for method in evidence.methods if method.points]
    sentences = _opening(evidence)
    if not evaluated:
        return Headline("No aligned policy has been evaluated yet.", sentences)
    if len(evaluated) == 1 or evidence.equal_kl is None:
        titles = [_gain_title(method) for method in evaluated]
        title = titles[0] if len(titles) == 1 else "The methods could not be compared at equal KL."
        sentences += [_gain_sentence(method) for method in evaluated]
    else:
        farther = _farther_and_better(evidence.equal_kl, evaluated)
        title = _ranking_title(evidence.equal_kl, farther)
        sentences += [_ranking_sentence(evidence.equal_kl), *_end_sentence(evaluated), *_exo_against_dpo(evidence)]
    sentences += _optimum_sentence(evidence, evaluated)
    sentences += _unfinished(evidence)
    return Headline(title, sentences)


def is_above_zero(value: Interval | None) -> bool:
    """Whether the whole interval lies above 0."""
    return value is not None and value.low is not None and value.low > 0


def _opening(evidence: Evidence) -> list[str]:
    if evidence.sft is None:
        return []
    model = f"The supervised policy ({evidence.policy})" if evidence.policy else "The supervised policy"
    return [
        f"{model} starts from a mean reward of {interval(evidence.sft.reward)} on "
        f"{evidence.num_prompts} held-out prompts."
    ]


def _gain_title(method: MethodEvidence) -> str:
    if is_above_zero(method.gain):
        return f"{method.name} raises the reward."
    if method.gain and method.gain.high is not None and method.gain.high < 0:
        return f"{method.name} lowers the reward."
    return f"{method.name} does not measurably change the reward."


def _gain_sentence(method: MethodEvidence) -> str:
    last = method.points[-1]
    return (
        f"{method.name} ends at mean reward {interval(last.reward)}, {interval(method.gain)} above the supervised "
        f"policy's, at KL {interval(last.kl)} nats from it."
    )


def _ranking_title(equal: EqualKL, farther: MethodEvidence | None) -> str:
    best, *others = equal.standings
    if not others:
        return f"{best.method} is the only method that moved far enough to be judged."
    level = [s.method for s in others if not is_above_zero(s.behind_leader)]
    if not level and farther is None:
        return f"{best.method} gets the most reward for its KL."
    if not level and farther is not None:
        return f"At KL {number(equal.kl, 2)} {best.method} leads; {farther.name} goes further and gets more."
    if len(level) == len(others) and len(others) > 1:
        return "At equal KL, no method is clearly ahead."
    behind = [s.method for s in others if s.method not in level]
    rest = f", ahead of {_list(behind)}" if behind else ""
    return f"At equal KL, {_list([best.method, *level])} are level{rest}."


def _farther_and_better(equal: EqualKL, evaluated: list[MethodEvidence]) -> MethodEvidence | None:
    """The method with the most reward at its end, if it is not the leader and the two intervals do not overlap."""
    lead = equal.standings[0].method
    leader = next(method for method in evaluated if method.name == lead)
    best = max(evaluated, key=_end_reward)
    low, high = best.points[-1].reward.low, leader.points[-1].reward.high
    return best if best is not leader and low is not None and high is not None and low > high else None


def _end_reward(method: MethodEvidence) -> float:
    return method.points[-1].reward.estimate


def _end_sentence(evaluated: list[MethodEvidence]) -> list[str]:
    best = max(evaluated, key=_end_reward)
    last = best.points[-1]
    return [
        f"At the end of training {best.name} has the most reward, {interval(last.reward)} at KL {interval(last.kl)}."
    ]


def _ranking_sentence(equal: EqualKL) -> str:
    best, *others = equal.standings
    text = (
        f"At {number(equal.kl)} nats from the supervised policy, which all compared methods reach, {best.method} has "
        f"mean reward {interval(best.reward)}"
    )
    if others:
        second = others[0]
        text += f", {interval(second.behind_leader)} more than {second.method}, the next"
        if not is_above_zero(second.behind_leader):
            text += "; that interval includes 0, so the order may be chance"
    if equal.left_out:
        text += f". Not compared, since at their best too close to the supervised policy: {_list(equal.left_out)}"
    return text + "."


def _exo_against_dpo(evidence: Evidence) -> list[str]:
    """One sentence per pair of EXO and DPO on the same target."""
    by_name = {method.name: method for method in evidence.methods}
    sentences = []
    for pair in evidence.comparisons:
        first, second = by_name[pair.first], by_name[pair.second]
        if {first.family, second.family} == {"exo", "dpo"} and first.target == second.target:
            sentences.append(_duel(pair, first, second))
    return sentences


def _duel(pair: Comparison, first: MethodEvidence, second: MethodEvidence) -> str:
    on = {"reward": "On rewards", "preference": "On preferences"}.get(first.target or "", "Against each other")
    amount, at = interval(pair.difference), f"at KL {number(pair.kl)}"
    if is_above_zero(pair.difference):
        return f"{on}, {_titled(first)} is ahead of {_titled(second)}: {amount} more reward {at}."
    return f"{on}, {_titled(first)} and {_titled(second)} are level: a difference of {amount} {at}."


def _titled(method: MethodEvidence) -> str:
    return f"{method.family.upper()} ({method.name})"


def _optimum_sentence(evidence: Evidence, evaluated: list[MethodEvidence]) -> list[str]:
    gaps = [(method.name, method.gap) for method in evaluated if method.gap is not None]
    if not gaps:
        return []
    name, gap = min(gaps, key=lambda pair: pair[1].gap.estimate)
    return [
        f"The best possible policy at KL {number(gap.kl)} is estimated {interval(gap.gap)} above {name}, the closest."
    ]


def _unfinished(evidence: Evidence) -> list[str]:
    names = [method.name for method in evidence.methods if not method.finished]
    return [f"Stopped before the end of training: {_list(names)}."] if names else []


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
