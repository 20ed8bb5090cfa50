"""What `evaluation/evidence.json` holds: everything the report says, as plain numbers and texts.

Every class is a frozen dataclass of JSON values; `write_evidence` and `read_evidence` are each other's inverse.
A value that does not exist is None, never NaN. Log-ratios and KL are in nats.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from exalign.errors import InputError
from exalign.storage import read_sealed, write_sealed

EVIDENCE_VERSION = 1


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval over `num_prompts` prompts; no bounds where one prompt stands alone."""

    estimate: float
    low: float | None
    high: float | None
    num_prompts: int

    @property
    def ends(self) -> tuple[float, float]:
        """Its bounds, or twice the estimate where it has none."""
        return (
            self.estimate if self.low is None else self.low,
            self.estimate if self.high is None else self.high,
        )


@dataclass(frozen=True)
class WinRate:
    """Share of pairs of samples that the first policy wins; a tie counts half.

    `missing_prompts` had no samples on one of the two sides and are left out. `at_equal_length` is the rate that would
    stand if both were equally long in characters (`length_controlled_win_rate`).
    """

    opponent: str
    rate: Interval
    ties: float
    num_pairs: int
    missing_prompts: int
    at_equal_length: Interval | None = None


@dataclass(frozen=True)
class HeldOut:
    """What a policy's implicit reward, β times log π_θ − log π_sft, makes of held-out preference pairs.

    `accuracy` is the share of pairs in which the preferred text has the larger log-ratio (a tie counts half), `margin`
    the mean difference of the two log-ratios, `preferred` and `rejected` the mean of each, in nats: β is left out.
    Intervals are over prompts, of which one may have several pairs. Of answers with a label each, two are a pair where
    one has the higher label.
    """

    accuracy: Interval
    margin: Interval
    preferred: Interval
    rejected: Interval


@dataclass(frozen=True)
class FrontierPoint:
    """One checkpoint: mean reward and KL(π_θ‖π_sft) ≈ mean(log π_θ − log π_sft) over its samples.

    `reward_std` is the standard deviation over samples, `reward_std_within` its mean over prompts within each,
    `accuracy` the mean of σ(reward) (where rewards are a classifier's log-odds), `tokens` the mean length,
    `finished` the share that ended by the end-of-sequence token, `repetition` the share of a sample's 4-grams of tokens
    that it had before, `gain` the reward less that of π_sft, paired by prompt, `changes` the same of tokens, finished
    and repetition, `parts` the means of a sum of scorers,
    `objective` the share that it has of what its method's objective E r − β KL can gain over π_sft.
    Where nothing was scored, rewards are None; `held_out` is there where the checkpoint read held-out preference pairs.
    A policy with other tokens than π_sft has no KL.
    """

    step: int
    reward: Interval | None
    kl: Interval | None
    reward_std: float | None
    num_samples: int
    accuracy: Interval | None = None
    tokens: float | None = None
    finished: float | None = None
    win_vs_sft: WinRate | None = None
    reward_std_within: float | None = None
    repetition: float | None = None
    gain: Interval | None = None
    held_out: HeldOut | None = None
    parts: dict[str, float] = field(default_factory=dict)
    objective: Interval | None = None
    changes: dict[str, Interval] = field(default_factory=dict)

    @property
    def nats(self) -> float:
        """The estimate of the KL; ∞ where there is none."""
        return math.inf if self.kl is None else self.kl.estimate

    @property
    def measured(self) -> Interval | None:
        """The mean reward, without rewards the accuracy on held-out pairs; None where neither was measured."""
        return self.held_out.accuracy if self.held_out and not self.reward else self.reward


@dataclass(frozen=True)
class OptimumPoint:
    """π*_β at one β = β_π·β_r: its mean reward, its KL to π_sft, and how many samples carry the estimate.

    `ess` is the median effective sample size over prompts whose samples differ in reward; where it is small the point
    is not `reliable`.
    """

    beta: float
    reward: Interval
    kl: Interval
    ess: float
    reliable: bool


@dataclass(frozen=True)
class Optimum:
    """The estimated optimal frontier, from small KL to large, from a pool of samples of π_sft."""

    points: list[OptimumPoint]
    num_prompts: int
    fewest_samples: int
    most_samples: int
    least_ess: float


@dataclass(frozen=True)
class BestOfN:
    """The best of N samples of π_sft by reward: its mean reward, and log N − (N−1)/N, a bound on its KL to π_sft."""

    n: int
    reward: Interval
    kl_bound: float
    win_rates: list[WinRate] = field(default_factory=list)


@dataclass(frozen=True)
class Gap:
    """Reward of the estimated optimum minus the method's, at the largest KL where both are known.

    `below_first_checkpoint` says that the method's reward there is interpolated between π_sft and its first checkpoint.
    """

    kl: float
    gap: Interval
    below_first_checkpoint: bool


@dataclass(frozen=True)
class Standing:
    """A method's reward at the KL that all compared methods reach, and the leader's lead over it there."""

    method: str
    reward: Interval
    behind_leader: Interval | None


@dataclass(frozen=True)
class Comparison:
    """Reward of `first` minus reward of `second` at the largest KL that both reach."""

    first: str
    second: str
    kl: float
    difference: Interval


@dataclass(frozen=True)
class EqualKL:
    """Methods compared at one KL, best first; `left_out` moved too little from π_sft to be compared there."""

    kl: float
    standings: list[Standing]
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """Policies that are the ends of trainings of their own: the setting in which they differ, its values, their β."""

    setting: str
    values: list[float]
    betas: list[float | None]


@dataclass(frozen=True)
class MethodEvidence:
    """One alignment method, its points in the order of training.

    `family` and `label` are how it is drawn and called (exo and EXO), `line` a sentence that it says of itself;
    `target` is reward, preference or None where unknown. `gain`, `win_rates`, `by_category` (win rates on the prompts
    of each category), `by_part` (by each scorer of a sum) and `gap` are those of the last checkpoint; `gain` is its
    mean reward minus π_sft's, paired by prompt. `finished` is false where training stopped before its end. `aim` is the
    optimum at its own β, estimated from the pool, where that has the rewards that it was trained on. With a `sweep` its
    points are not along one training: each is the end of its own, in their order.
    """

    name: str
    family: str
    target: str | None
    finished: bool
    points: list[FrontierPoint]
    win_rates: list[WinRate]
    gain: Interval | None = None
    gap: Gap | None = None
    selected_step: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    line: str = ""
    aim: OptimumPoint | None = None
    by_category: dict[str, list[WinRate]] = field(default_factory=dict)
    by_part: dict[str, list[WinRate]] = field(default_factory=dict)
    sweep: Sweep | None = None

    def at(self, step: int) -> str:
        """Which of its policies one is: that of a step, or of a value of its sweep, counted from 1.

        >>> sweep = Sweep("kl", [0.5, 1.0], [None, 0.2])
        >>> method = MethodEvidence("exo", "exo", "reward", True, [], [], sweep=sweep)
        >>> method.at(1), method.at(2)
        ('its kl 0.5', 'its β 0.2')
        """
        if self.sweep is None:
            return f"step {step}"
        beta = self.sweep.betas[step - 1]
        return f"its {self.sweep.setting} {self.sweep.values[step - 1]:.3g}" if beta is None else f"its β {beta:.3g}"

    @property
    def on(self) -> tuple[str | None, int | None]:
        """Its target and its own K: only methods that have both alike are set against each other."""
        return self.target, self.settings.get("num_completions")

    @property
    def called(self) -> str:
        return self.label or self.name


@dataclass(frozen=True)
class Curve:
    """Training metrics of one stage, averaged over buckets of consecutive steps; None where a bucket has no value."""

    stage: str
    num_rows: int
    steps: list[float]
    values: dict[str, list[float | None]]

    def total(self, name: str) -> float | None:
        """The sum of a metric over all steps; None where it was not written, or not finite throughout a bucket.

        >>> Curve("sft", 3, [1.5, 3.0], {"seconds": [2.0, 5.0]}).total("seconds")  # steps 1 and 2, then step 3
        9.0
        """
        means = self.values.get(name, [None])
        if any(mean is None for mean in means):
            return None
        each, longer = divmod(self.num_rows, len(means))  # the first buckets are longer by one row
        return sum((mean or 0.0) * (each + (place < longer)) for place, mean in enumerate(means))


@dataclass(frozen=True)
class Answer:
    """One text under an example prompt; `log_ratio` is log π(y|x) − log π_sft(y|x) of the policy that wrote it."""

    source: str
    text: str
    reward: float | None = None
    log_ratio: float | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Remark:
    """What a language model wrote about two answers to a prompt. `a` and `b` are the sources of those shown as A and B.

    `in_favour_of` is one of the two, tie or unreadable.
    """

    prompt_id: str
    judge: str
    a: str
    b: str
    text: str
    in_favour_of: str


@dataclass(frozen=True)
class Example:
    """A prompt with the first sample of every policy on it, and what judges wrote about these."""

    id: str
    prompt: str
    answers: list[Answer]
    remarks: list[Remark] = field(default_factory=list)


@dataclass(frozen=True)
class Course:
    """How a method's answers changed while it was trained: on each prompt those of π_sft and of its checkpoints."""

    method: str
    examples: list[Example]


@dataclass(frozen=True)
class Stage:
    """A finished stage of the run: its wall time, and what it dropped or cut."""

    name: str
    seconds: float | None
    counts: dict[str, int]


@dataclass(frozen=True)
class Tally:
    """How `first` fared against `second`: shares in [0, 1] with 95 % intervals over prompts, None without verdicts.

    A prompt's shares are averaged over its judgements first, so that every prompt weighs the same. `score` is
    win + tie/2. `unreadable` judgements are counted and take no part in the shares.
    """

    first: str
    second: str
    criterion: str
    win: Interval | None
    tie: Interval | None
    lose: Interval | None
    score: Interval | None
    num_judgements: int
    unreadable: int


@dataclass(frozen=True)
class ModelMatchUp:
    """A match-up judged by a language model, every pair asked about in both orders.

    `tally` counts a pair as won where both orders say so. `length_controlled` is the win rate at equal length,
    `flip_rate` the share of pairs in which each order named another winner, `half_ties` that in which one order alone
    was a tie, `shown_first` the share of all decisions for the answer shown first (½ is no position bias). `unanswered`
    pairs have not been judged yet, `identical` ones are the same text twice, a tie that nobody was asked about. Tokens
    leave out `answers_without_usage`. `outdated` pairs compare an answer that the run has since replaced.
    """

    tally: Tally
    num_pairs: int
    identical: int
    unanswered: int
    length_controlled: Interval | None
    flip_rate: Interval | None
    half_ties: Interval | None
    shown_first: Interval | None
    prompt_tokens: int
    completion_tokens: int
    answers_without_usage: int
    outdated: int


@dataclass(frozen=True)
class ModelJudge:
    """What one language model said, asked with one template."""

    name: str
    template: str
    match_ups: list[ModelMatchUp]


@dataclass(frozen=True)
class AssessorAgreement:
    """How far the people of a study agree, on the comparisons (`num_items`) that at least two of them judged.

    `alpha` is Krippendorff's, ordinal over lose < tie < win; `pairwise` the share of equal pairs of verdicts,
    `without_ties` the same where neither is a tie.
    """

    criterion: str
    alpha: Interval | None
    pairwise: Interval | None
    without_ties: Interval | None
    num_items: int
    num_assessors: int


@dataclass(frozen=True)
class PeopleStudy:
    """What people said in one study. Nobody is named. `num_asked` is how many verdicts were asked for, where known.

    `tallies` (by criterion, then match-up) and `agreement` hold the overall verdict first, then the criteria that
    anybody answered.
    """

    name: str
    num_assessors: int
    num_prompts: int
    num_verdicts: int
    num_asked: int | None
    outdated: int
    tallies: list[Tally]
    agreement: list[AssessorAgreement]


@dataclass(frozen=True)
class JudgeAgreement:
    """A model's verdicts on a match-up against those of `other` (another model, or the people of a study).

    Over the `num_pairs` that both judged, identical texts left out: `raw` is the share of equal verdicts,
    `without_ties` the same where neither is a tie, `kappa` Cohen's, `alpha` Krippendorff's (ordinal), and
    `among_others` the share of equal verdicts among the others themselves, where there are several.
    """

    first: str
    second: str
    judge: str
    other: str
    by_people: bool
    num_pairs: int
    raw: Interval | None
    without_ties: Interval | None
    kappa: float | None
    alpha: Interval | None
    among_others: Interval | None


@dataclass(frozen=True)
class Judgements:
    """What language models and people said about the run's answers. Intervals are over prompts, as everywhere.

    `seed` is that of their resamples; `notes` are sentences about what was left out. `remarks` are on answers that the
    run has now, each order its own; evidence keeps them beside the examples that it shows.
    """

    judges: list[ModelJudge] = field(default_factory=list)
    studies: list[PeopleStudy] = field(default_factory=list)
    agreement: list[JudgeAgreement] = field(default_factory=list)
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)


@dataclass(frozen=True)
class BenchmarkRow:
    """A metric of a task of lm-eval for one policy (`after`) and for what it started from (`before`), where asked for.

    A value stands with its standard error, None where the harness has none. `difference` is after less before with a
    95 % interval, ±1.96 standard errors: where `paired`, those of the mean of the differences document by document,
    else those of two independent values. No interval where a standard error is missing.
    """

    policy: str
    task: str
    metric: str
    higher_is_better: bool | None
    after: tuple[float, float | None]
    before: tuple[float, float | None] | None
    difference: Interval | None
    paired: bool

    @property
    def outcome(self) -> str:
        """What the interval of the difference says."""
        found = self.difference
        if found is None or found.low is None or found.high is None or found.low <= 0 <= found.high:
            return "may be chance"
        if self.higher_is_better is None:
            return "changed"
        return "gained" if (found.estimate > 0) == self.higher_is_better else "lost"


@dataclass(frozen=True)
class Benchmark:
    """What `harness` measured, on the first `limit` documents of a task where one was set.

    `sums` are the checksums of the policies by name as they were; `outdated` those that the run has since replaced.
    """

    harness: str
    limit: int | None
    rows: list[BenchmarkRow]
    sums: dict[str, str] = field(default_factory=dict)
    outdated: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """What one trial tried, and what came of it: `value` is the mean reward at `kl` nats, or None where it `failed`.

    `values` are the settings that are searched over, `settings` all of them. `points` are the saved policies: step,
    mean reward, mean KL. `seconds` are those of the training steps. A trial that tries what an earlier one tried is
    the `same_as` that one and is not trained again.
    """

    number: int
    values: dict[str, Any]
    settings: dict[str, Any]
    value: float | None = None
    kl: float | None = None
    points: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    failed: str | None = None
    same_as: int | None = None


@dataclass(frozen=True)
class Search:
    """All trials of one method, ranked by mean reward at `kl` nats, and the number of the best."""

    method: str
    kl: float
    best: int
    trials: list[Trial]


@dataclass(frozen=True)
class DensityCurve:
    """π(y|x)/π_sft(y|x) along log π_sft(y|x) for one policy, with the bounds of its interval over the samples.

    `effective_samples` says how many equal weights the policy's importance weights are worth: near 1 a single sample
    carries the whole curve.
    """

    policy: str
    ratio: list[float]
    low: list[float]
    high: list[float]
    effective_samples: float


@dataclass(frozen=True)
class PromptDensity:
    """The curves of one prompt over `grid` (log π_sft, nats), and the `samples` of π_sft (sorted) they come from.

    All curves of a prompt are smoothed by the same Gaussian kernel with standard deviation `bandwidth` (nats).
    """

    id: str
    prompt: str
    samples: list[float]
    grid: list[float]
    bandwidth: float
    curves: list[DensityCurve]


@dataclass(frozen=True)
class DensityRatios:
    """Density ratios on a few prompts. The optimum's `beta` is what the method `beta_of` aims at; None without one."""

    prompts: list[PromptDensity]
    beta: float | None = None
    beta_of: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The checkpoint to ship, and where it stands in the run.

    With a KL budget (`within`, nats) it has the most reward of those within it that surely gained, else the highest
    lower bound of what it gains over π_sft, of all but those `passed_over`, whose KL a best of N shows to be wasted;
    without a scorer, the highest lower bound of the accuracy on held-out pairs. `certain` says that the interval of
    that gain excludes 0, also as one of the `among` that it was chosen from. `example` is a prompt drawn by
    chance with the first sample of both.
    """

    method: str
    step: int
    folder: str
    within: float | None
    certain: bool
    example: Example | None = None
    passed_over: int = 0
    among: int = 1


@dataclass(frozen=True)
class Evidence:
    """A run's evidence. `notes` are sentences about what is missing or was left out, `warnings` about what matters.

    `answers` says how those of win rates, judgements and examples were drawn, where they are not the samples that
    rewards and KL are of. `worst` are the prompts on which the verdict's checkpoint lost most reward against π_sft.
    `proxy_optimum` is the optimum for the reward that methods were trained on, where the evaluation has another one,
    with the evaluation's reward.
    """

    name: str
    policy: str | None
    temperature: float | None
    kl_budget: float | None
    confidence: float
    num_resamples: int
    seed: int
    num_prompts: int
    sft: FrontierPoint | None
    methods: list[MethodEvidence]
    equal_kl: EqualKL | None
    comparisons: list[Comparison]
    optimum: Optimum | None
    best_of_n: list[BestOfN]
    examples: list[Example]
    curves: list[Curve]
    stages: list[Stage]
    record_counts: dict[str, dict[str, int]]
    notes: list[str]
    environment: dict[str, Any]
    recipe: str
    judgements: Judgements = field(default_factory=Judgements)
    searches: list[Search] = field(default_factory=list)
    density: DensityRatios | None = None
    verdict: Verdict | None = None
    warnings: list[str] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    courses: list[Course] = field(default_factory=list)
    answers: str | None = None
    benchmark: Benchmark | None = None
    proxy_optimum: Optimum | None = None
    version: int = EVIDENCE_VERSION

    @property
    def scored(self) -> bool:
        return self.sft is None or self.sft.reward is not None

    def chosen(self) -> tuple[MethodEvidence, FrontierPoint] | None:
        if self.verdict is None:
            return None
        method = next(method for method in self.methods if method.name == self.verdict.method)
        return method, next(point for point in method.points if point.step == self.verdict.step)


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write `evidence` as JSON, atomically; a NaN anywhere is a `ValueError`."""
    write_sealed(path, asdict(evidence))


def read_evidence(path: Path) -> Evidence:
    """Read what `write_evidence` wrote; a damaged file or another version is an `InputError`."""
    values = read_sealed(path)
    found = values.get("version")
    if found != EVIDENCE_VERSION:
        raise InputError(f"{path} has evidence format {found}; this exalign reads {EVIDENCE_VERSION}: evaluate again.")
    try:
        return TypeAdapter(Evidence).validate_python(values)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InputError(f"{path} is damaged at {where}; delete it and evaluate again.") from None
