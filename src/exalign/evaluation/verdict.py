"""Which checkpoint to ship, within a KL budget or without one, and what to be warned of before it is.

A checkpoint is within a budget (nats) where its estimated KL is. Selection is on the very samples that measured the
rewards, so the best of many checkpoints looks a little better than it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exalign.errors import InputError
from exalign.evaluation.frontier import lower_bound, merit, select_within
from exalign.evaluation.pool import LEAST_ESS, OPTIMUM
from exalign.evaluation.run_folder import SUPERVISED, RunFolder
from exalign.evaluation.schema import (
    BestOfN,
    Curve,
    DensityRatios,
    FrontierPoint,
    Interval,
    Judgements,
    MethodEvidence,
    Optimum,
    Verdict,
)
from exalign.evaluation.statistics import wilson

LENGTH_CHANGE = 0.25
"""A mean length that changed by this share of the supervised policy's is warned of."""
MISLED = 0.5
"""Below this share of the best possible gain the optimum for the training reward is warned of."""
RISE = 0.05
"""A share of repeated 4-grams, or of samples cut at the limit, that rose by this is warned of."""
LEAST_OWN = 1.5
"""Effective samples a prompt, of the K ≥ 2, below which the correction of own samples is warned of."""
EQUAL = 0.5
"""From this share on, prompts whose samples all have the same reward are warned of."""
WASTED, WARNED = 4, 2
"""A checkpoint whose KL is so many times that of a best of N with more reward is passed over; and is warned of."""
KL_SPREAD = 0.5
"""A KL whose interval is wider than itself is warned of from this many nats on."""


@dataclass(frozen=True)
class Selected:
    """A method and its best checkpoint within the budget: the point, and what to load: a folder inside
    the run, or where the policy was trained."""

    method: str
    point: FrontierPoint
    folder: str


def select(run: Path, kl_budget: float) -> tuple[list[Selected], list[str]]:
    """The selected checkpoint of each method, the best first, and the methods that have none within the budget (nats).

    A run without an evaluation is an `InputError`.
    """
    if not kl_budget > 0:
        raise InputError(f"--kl-budget {kl_budget:g} allows no checkpoint; give a number of nats above 0.")
    place = RunFolder(run)
    points = {method.name: select_within(method.points, kl_budget) for method in place.read_evidence().methods}
    found = [
        Selected(name, point, place.ships(name, point.step)) for name, point in points.items() if point is not None
    ]
    best_first = sorted(found, key=lambda one: merit(one.point, len(found)), reverse=True)
    return best_first, [name for name, point in points.items() if point is None]


def verdict(
    methods: Sequence[MethodEvidence], kl_budget: float | None, best_of_n: Sequence[BestOfN] = ()
) -> Verdict | None:
    """The checkpoint to ship of all methods; None where nothing was measured, or nothing is within the budget.

    Without a budget those are passed over whose KL a best of N shows to be wasted, unless all are.
    """
    nats = math.inf if kl_budget is None else kl_budget
    pairs = ((method, point) for method in methods for point in method.points if point.nats <= nats)
    able = [pair for pair in pairs if lower_bound(pair[1], 1) > -math.inf]
    kept = [pair for pair in able if kl_budget or beaten_by(pair[1], best_of_n) is None] or able
    if not kept:
        return None

    def rank(pair: tuple[MethodEvidence, FrontierPoint]) -> tuple[float, float]:
        low = lower_bound(pair[1], len(kept))
        return merit(pair[1], len(kept)) if kl_budget else (low, -pair[1].nats)

    method, point = max(kept, key=rank)
    folder = RunFolder(Path()).policy(method.name, point.step).as_posix()
    value = point.gain if point.reward else point.measured
    certain = value is not None and value.low is not None and lower_bound(point, len(kept)) > 0
    passed_over = len(able) - len(kept)
    return Verdict(method.name, point.step, folder, kl_budget, certain, passed_over=passed_over, among=len(kept))


def beaten_by(point: FrontierPoint, best_of_n: Sequence[BestOfN], times: float = WASTED) -> BestOfN | None:
    """The best of few samples of π_sft that surely has more reward than a policy, `times` nearer than that, if any."""
    if point.reward is None or point.reward.high is None or point.kl is None:
        return None
    high, nats = point.reward.high, point.nats
    sure = (best for best in best_of_n if best.reward.low is not None and best.reward.low > high)
    return next((best for best in sure if times * best.kl_bound < nats), None)


def warnings(
    sft: FrontierPoint,
    shown: Sequence[tuple[str, FrontierPoint]],
    optimum: Optimum | None,
    density: DensityRatios | None,
    judgements: Judgements,
    curves: Sequence[Curve] = (),
    methods: Sequence[MethodEvidence] = (),
    best_of_n: Sequence[BestOfN] = (),
) -> list[str]:
    """A sentence for everything that matters before one of the policies is used.

    `shown` are the checkpoints that are looked at, each with its method's name; `curves` what training logged;
    `methods` what was aimed at, `best_of_n` what samples of the supervised policy give without any training.
    """
    return [
        *_out_of_reach(methods, optimum),
        *_wasted(shown, best_of_n),
        *_lengths(sft, shown),
        *_rising(sft, shown),
        *_uncertain_kl(shown),
        *_few_effective_samples(shown, optimum, density),
        *_disagreement(shown, judgements),
        *(line for curve in curves for line in own_sample_warnings(curve.stage.removeprefix("align/"), curve.values)),
    ]


def scorer_accuracy(counts: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """How often the scorer agrees with held-out preferences and labels: a sentence of each kind, or a warning.

    `counts` are those of the stage that scored them, an equal reward counting half; intervals are Wilson's. A warning
    where one is not above a half. Of a sum each scorer is told, too.

    >>> scorer_accuracy({"pairs_scored": 400, "pairs_scored_right": 252})[0]
    ['The scorer prefers the answer that held-out preferences prefer in 63 % [58, 68] of 400 pairs.']
    """
    told, doubt, prefers = [], [], "The scorer{} prefers the answer that held-out preferences prefer in {} pairs"
    parts = [name.partition(" by ")[2] for name in counts if name.startswith("pairs_scored by ")]
    for what, part, says in (
        ("pairs", "", prefers),
        *(("pairs", part, prefers) for part in parts),
        ("labels", "", "The scorer{} has the label right of {} held-out texts"),
    ):
        by = f" by {part}" if part else ""
        if number := counts.get(f"{what}_scored{by}", 0):
            right = counts.get(f"{what}_scored_right{by}", 0) + counts.get(f"{what}_scored_alike{by}", 0) / 2
            low, high = wilson(right / number, number)
            shown = f"{100 * right / number:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
            said = says.format(f" {part}" if part else "", f"{shown} of {number:,}")
            if high < 0.5:
                doubt.append(f"{said}: as a reward does whose sign is the wrong way round.")
            elif low <= 0.5 and not part:
                doubt.append(f"{said}, which may be chance: a gain of its rewards may be none.")
            else:
                told.append(f"{said}.")
    return told, doubt


def misled(kl: float, share: Interval) -> list[str]:
    """A sentence where even the optimum for the training reward surely has little of what could be gained at `kl`."""
    if share.high is None or share.high >= MISLED:
        return []
    estimate, low, high = (_signed(100 * value, 0) for value in (share.estimate, *share.ends))
    return [
        f"The reward that was trained on is the limit: at {kl:.2g} nats the optimum for it has {estimate} % "
        f"[{low}, {high}] of what could be gained by the evaluation's scorer. A better reward, not another "
        "method or β, is what is missing."
    ]


def _signed(value: float, places: int) -> str:
    """With a true minus, and none before a zero."""
    return f"{value:z.{places}f}".replace("-", "−")


def _out_of_reach(methods: Sequence[MethodEvidence], optimum: Optimum | None) -> Iterator[str]:
    """A sentence where the optimum at methods' own β is farther away than the pool of π_sft's samples can show."""
    far = [
        f"{method.name} (β = {method.aim.beta:.3g}: {method.aim.kl.estimate:.1f} nats or more)"
        for method in methods
        if method.aim is not None and not method.aim.reliable
    ]
    if far and optimum is not None:
        most = optimum.most_samples
        yield (
            f"What is aimed at is out of reach of π_sft's samples: {', '.join(far)}; {most:,} samples of a prompt show "
            f"at most log {most:,} = {math.log(most):.1f} nats. So far away the divergence has little influence and "
            "much of the KL is wasted; a larger β (beta_r, or beta) aims at what training can reach."
        )


def _wasted(shown: Sequence[tuple[str, FrontierPoint]], best_of_n: Sequence[BestOfN]) -> Iterator[str]:
    """A sentence for a policy that the best of few samples of π_sft surely beats at less than half of its KL."""
    for name, point in shown:
        if (best := beaten_by(point, best_of_n, WARNED)) is not None:
            better = (
                "the supervised policy itself: its KL buys nothing"
                if best.n == 1
                else f"the best of {best.n} samples of the supervised policy, which is {best.kl_bound:.1f} nats away "
                "at most: most of its KL buys nothing"
            )
            yield (
                f"{name} is {point.nats:.1f} nats away and has less reward than {better}. A nearer checkpoint, or a "
                "larger β, is the better choice."
            )


def own_sample_warnings(name: str, metrics: Mapping[str, Sequence[float | None]]) -> Iterator[str]:
    """Sentences about a training on own samples, from its metrics over steps.

    The correction for where the samples came from should stand on more than `LEAST_OWN` of them, and a prompt whose
    completions all have the same reward teaches nothing.
    """
    effective = [value for value in metrics.get("effective_samples", ()) if value is not None]
    few = sum(value < LEAST_OWN for value in effective)
    if few:
        yield (
            f"{name}: for {100 * few / len(effective):.0f} % of the training the correction for where its samples came "
            f"from stood on fewer than {LEAST_OWN} effective samples a prompt; lower fresh_every or the learning rate."
        )
    equal = [value for value in metrics.get("equal_rewards", ()) if value is not None]
    if equal and sum(equal) / len(equal) >= EQUAL:
        yield (
            f"{name}: {100 * sum(equal) / len(equal):.0f} % of the prompts had completions of one and the same reward, "
            "which teach nothing; more completions, other prompts or a finer reward would."
        )


def _lengths(sft: FrontierPoint, shown: Sequence[tuple[str, FrontierPoint]]) -> Iterator[str]:
    start = sft.tokens
    changed = [
        f"{name} {point.tokens:.1f}"
        for name, point in shown
        if start and point.tokens and abs(point.tokens / start - 1) >= LENGTH_CHANGE and _surely(point, "tokens")
    ]
    if changed:
        yield (
            f"The mean length changed by a quarter or more, from {start:.1f} tokens to: {', '.join(changed)}. Read "
            "samples to see whether the answers got better or only shorter or longer."
        )
    by_length = []
    for name, point in shown:
        won = point.win_vs_sft
        if won and won.rate.low and (equal := won.at_equal_length) and won.rate.low > 0.5 >= (equal.low or 0):
            by_length.append(f"{name} {100 * won.rate.estimate:.0f} %, at equal length {100 * equal.estimate:.0f} %")
    if by_length:
        yield (
            f"What is won against the supervised policy may be won by length: {', '.join(by_length)}, which may be "
            "chance."
        )


def _surely(point: FrontierPoint, name: str) -> bool:
    """Whether a change from the supervised policy is more than chance, as far as its interval is known."""
    change = point.changes.get(name)
    return change is None or (change.low is not None and not change.low <= 0 <= change.ends[1])


def _rising(sft: FrontierPoint, shown: Sequence[tuple[str, FrontierPoint]]) -> Iterator[str]:
    shares: dict[str, tuple[str, Callable[[FrontierPoint], float | None]]] = {
        "Answers repeat themselves (share of repeated 4-grams)": ("repetition", lambda p: p.repetition),
        "More answers are cut at the limit of tokens": (
            "finished",
            lambda p: None if p.finished is None else 1 - p.finished,
        ),
    }
    for what, (name, read) in shares.items():
        if (start := read(sft)) is None:
            continue
        values = [(method, read(point)) for method, point in shown if _surely(point, name)]
        risen = [f"{method} {100 * v:.0f} %" for method, v in values if v is not None and v - start >= RISE]
        if risen:
            yield f"{what}: {', '.join(risen)}; the supervised policy {100 * start:.0f} %."


def _uncertain_kl(shown: Sequence[tuple[str, FrontierPoint]]) -> Iterator[str]:
    for name, point in shown:
        kl = point.kl
        if kl is None or kl.low is None or kl.high is None:
            continue
        if kl.estimate >= KL_SPREAD and kl.high - kl.low > kl.estimate:
            yield (
                f"The KL of {name} is more than its samples can measure: {kl.estimate:.1f} nats, somewhere from "
                f"{_signed(kl.low, 1)} to {kl.high:.1f}. More evaluate.samples or evaluate.prompts make it certain."
            )


def _few_effective_samples(
    shown: Sequence[tuple[str, FrontierPoint]], optimum: Optimum | None, density: DensityRatios | None
) -> Iterator[str]:
    few = f"fewer than {LEAST_ESS:.0f} effective samples"
    if optimum is not None and not all(point.reliable for point in optimum.points):  # else it came to its end
        reach = max((point.kl.estimate for point in optimum.points if point.reliable), default=0.0)
        beyond = [f"{name} ({point.nats:.1f} nats)" for name, point in shown if math.inf > point.nats > reach]
        if beyond:
            yield (
                f"The estimated optimum stands on {few} beyond a KL of {reach:.1f} nats, so the best possible reward "
                f"is not known where they are: {', '.join(beyond)}."
            )
    if density is not None:
        found = [curve for prompt in density.prompts for curve in prompt.curves if curve.policy != OPTIMUM]
        thin = [curve.policy for curve in found if curve.effective_samples < LEAST_ESS]
        if thin:
            yield (
                f"{len(thin)} of the {len(found)} curves of density ratios stand on {few} "
                f"({', '.join(dict.fromkeys(thin))}): a few samples shape them."
            )


def _disagreement(shown: Sequence[tuple[str, FrontierPoint]], judgements: Judgements) -> Iterator[str]:
    """Where the reward rose, but a judge finds the answers worse."""
    gains = {name: point.gain for name, point in shown if point.gain is not None}
    risen = {name for name, gain in gains.items() if gain.low is not None and gain.low > 0}
    judged = [(judge.name, one.tally) for judge in judgements.judges for one in judge.match_ups]
    judged += [(f"people of {study.name}", tally) for study in judgements.studies for tally in study.tallies]
    for judge, tally in judged:
        asked = tally.first in risen and (tally.second, tally.criterion) == (SUPERVISED, "overall")
        if asked and tally.score is not None and tally.score.high is not None and tally.score.high < 0.5:
            yield (
                f"The reward of {tally.first} rose, but {judge} prefers the supervised policy's answers: win rate "
                f"{100 * tally.score.estimate:.0f} %."
            )
