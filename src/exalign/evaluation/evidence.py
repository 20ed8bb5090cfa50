"""A run folder in, its evidence out: `evaluation/evidence.json`, from which the report is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exalign.data.record import Completion, Record
from exalign.data.store import read_header
from exalign.errors import InputError
from exalign.evaluation.frontier import (
    Paths,
    at_equal_length,
    changes,
    compare_all,
    compare_pairs,
    frontier_point,
    held_out,
    held_out_labels,
    select_within,
    win_rate,
)
from exalign.evaluation.pool import (
    best_of_n,
    density_ratios,
    gap_to_optimum,
    objective_share,
    optimum,
    optimum_path,
    pool_frontier,
    proxy_share,
)
from exalign.evaluation.run_folder import RunFolder, complete_records, pool_rewards
from exalign.evaluation.sample_table import (
    SampleTable,
    log_ratio,
    render_prompt,
    tabulate,
    tabulate_labels,
    tabulate_pairs,
)
from exalign.evaluation.schema import (
    Answer,
    Course,
    Curve,
    Evidence,
    Example,
    FrontierPoint,
    HeldOut,
    Interval,
    Judgements,
    MethodEvidence,
    OptimumPoint,
    Remark,
    Stage,
    Verdict,
    WinRate,
    write_evidence,
)
from exalign.evaluation.statistics import CONFIDENCE, NUM_RESAMPLES, Array, Bootstrap
from exalign.evaluation.verdict import misled, scorer_accuracy, verdict, warnings
from exalign.storage import read_json

SFT = "SFT"
REFERENCE_TEXTS = "reference texts"
REFERENCE_TEXT = "reference text"
NUM_EXAMPLES, NUM_WORST = 8, 3
NUM_COURSE, COURSE_STEPS = 3, 5
"""Prompts on which a method's checkpoints are shown one beside the other, and at most how many of these."""


def build_evidence(
    run: Path,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    judgements: Judgements | None = None,
    stages: Collection[str] | None = None,
) -> Evidence:
    """`collect_evidence`, with its arguments and errors, written to `evaluation/evidence.json`."""
    evidence = collect_evidence(run, seed=seed, num_resamples=num_resamples, judgements=judgements, stages=stages)
    write_evidence(RunFolder(Path(run)).evidence, evidence)
    return evidence


def collect_evidence(
    run: Path,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    judgements: Judgements | None = None,
    stages: Collection[str] | None = None,
) -> Evidence:
    """Compute everything the report says about the run in folder `run`; nothing is written.

    Missing pieces (no scorer, no pool, no reference texts, a method that was stopped, one method only) leave their part
    empty and a sentence in `notes`. `judgements` is of `judging.judgements`. `stages` are those of the recipe, and what
    else stands in the folder is of an earlier one; None: all counts. Without samples of π_sft: `InputError`.
    """
    folder, bootstrap = RunFolder(Path(run), stages), Bootstrap(num_resamples, seed)
    judgements = Judgements() if judgements is None else judgements
    material = _Material(folder, bootstrap)
    methods = [_method(material, name) for name in material.methods]
    sft = _point(material, material.sft.as_reference(), 0)
    paths = Paths(material.sft, material.paths, bootstrap)
    density = density_ratios(material.density, material.aims, material.notes, bootstrap)
    best, proxy = (None if found is None else optimum(found, bootstrap) for found in (material.pool, material.proxy))
    curves, counted = _curves(folder)
    of_n = best_of_n(material.pool_rewards, material.opponents, bootstrap=bootstrap)
    chosen = verdict(methods, material.kl_budget, of_n)
    shown = _looked_at(methods, chosen)
    finished = folder.stages()
    right, doubt = _scorer_told(material, finished, shown)
    evidence = Evidence(
        name=str(material.recipe.get("name") or folder.path.resolve().name),
        policy=(material.recipe.get("model") or {}).get("source"),
        temperature=read_header(folder.supervised).temperature,
        answers=_answers_drawn(material.evaluate.get("answers")),
        kl_budget=material.kl_budget,
        confidence=CONFIDENCE,
        num_prompts=len(material.sft.ids),
        sft=sft,
        methods=methods,
        equal_kl=compare_all(paths, among=[method.name for method in methods if method.finished]),
        comparisons=compare_pairs(paths),
        optimum=best,
        best_of_n=of_n,
        examples=choose_examples(material.prompts, material.answers, NUM_EXAMPLES, seed, judgements.remarks),
        curves=curves,
        stages=finished,
        record_counts=folder.record_counts(),
        notes=material.notes + counted + judgements.notes + right,
        environment=folder.environment_values(),
        recipe=folder.recipe_text(),
        judgements=replace(judgements, remarks=[]),
        searches=folder.searches(),
        density=density,
        courses=[*_courses(material, methods, seed)],
        benchmark=folder.read_benchmark(),
        proxy_optimum=proxy,
        warnings=doubt + warnings(sft, shown, best, density, judgements, curves, methods, of_n),
        num_resamples=num_resamples,
        seed=seed,
    )
    return evidence if chosen is None else _with_texts(evidence, chosen, material)


def _curves(folder: RunFolder) -> tuple[list[Curve], list[str]]:
    """What trainings logged, and what was left out of it."""
    counts: Counter[str] = Counter()
    return folder.curves(counts), [f"{name.replace('_', ' ')}: {n}" for name, n in sorted(counts.items()) if n]


def _scorer_told(
    material: _Material, stages: Sequence[Stage], shown: Sequence[tuple[str, FrontierPoint]]
) -> tuple[list[str], list[str]]:
    """How far the scorer is right, and what there is to doubt about it."""
    right, doubt = scorer_accuracy(next((s.counts for s in stages if s.name == "evaluation/prompts"), {}))
    return right, doubt + _misled(material, max((point.nats for _, point in shown if point.kl), default=0.0))


def _looked_at(methods: Sequence[MethodEvidence], to_ship: Verdict | None) -> list[tuple[str, FrontierPoint]]:
    """Each method's last checkpoint, but of the one to ship the checkpoint that is shipped."""
    steps = {} if to_ship is None else {to_ship.method: to_ship.step}
    last = {method.name: steps.get(method.name, method.points[-1].step) for method in methods if method.points}
    return [(m.name, point) for m in methods for point in m.points if point.step == last[m.name]]


def _with_texts(evidence: Evidence, to_ship: Verdict, material: _Material) -> Evidence:
    """With one example of the verdict, and the prompts on which it lost most."""
    theirs = material.samples
    ours = complete_records(material.run.samples(to_ship.method, to_ship.step)) or []
    answers = {SFT: theirs, to_ship.method: ours}
    drawn = choose_examples(material.prompts, answers, 1, evidence.seed)
    folder = material.run.ships(to_ship.method, to_ship.step)
    shown = replace(to_ship, folder=folder, example=drawn[0] if drawn else None)
    return replace(evidence, verdict=shown, worst=_worst(theirs, ours, to_ship.method))


class _Material:
    """What a run folder offers, read once; `samples` are those of π_sft, `notes` say what the folder lacks.

    `log_odds` says that rewards are a classifier's, `aimed_at` that the pool's are those that methods were trained on;
    `trained_rewards` are those of the pool's samples, where they are known.
    """

    def __init__(self, run: RunFolder, bootstrap: Bootstrap) -> None:
        samples = complete_records(run.supervised)
        if samples is None:
            raise InputError(f"{run.supervised} is missing or incomplete; run the evaluate stage first.")
        self.run, self.bootstrap = run, bootstrap
        self.recipe, self.methods = run.recipe_values(), run.methods()
        self.samples, self.sft = samples, tabulate(samples, run.relative(run.supervised))
        self.prompts = complete_records(run.prompts) or []
        texts = [record for record in self.prompts if record.rewards is not None]
        self.reference = tabulate(texts, run.relative(run.prompts)) if texts else None
        self.pool_rewards = pool_rewards(run.pool) if run.counts(run.pool) else {}
        self.sft = replace(self.sft, more=self.pool_rewards)
        self.pool = pool_frontier(self.pool_rewards)
        self.trained_rewards = pool_rewards(run.proxy) if self.pool_rewards and run.counts(run.proxy) else {}
        self.proxy = pool_frontier(self.trained_rewards, judged=self.pool_rewards)
        trained, judge = _scorers(self.recipe)
        self.log_odds = bool(judge.get("classifier")) or judge.get("stage") == "oracle"
        given = (self.recipe.get("data") or {}).get("rewards")
        self.aimed_at = self.pool is not None and not given and bool(trained) and judge == trained
        if self.aimed_at:
            self.trained_rewards = self.pool_rewards
        own = {method: run.density(method) for method in self.methods if run.counts(run.density(method).parent)}
        density = {method: complete_records(folder) for method, folder in own.items()}
        self.density = {method: records for method, records in density.items() if records is not None}
        self.tables: dict[str, dict[int, SampleTable]] = {}
        self.held_out: dict[str, dict[int, HeldOut]] = {}
        self.judged: dict[str, dict[int, SampleTable]] = {}
        self.answers: dict[str, list[Record]] = {}
        self.first_samples: dict[str, dict[int, list[Record]]] = {}
        self.notes: list[str] = []
        self._note_missing()
        self._read_answers(SFT, 0, run.supervised, samples, self.sft)
        for method in self.methods:
            self._read_method(method)
            self._read_pairs(method)

    @property
    def paths(self) -> dict[str, list[SampleTable]]:
        """The samples of each method's checkpoints, where they have rewards."""
        return {name: list(steps.values()) for name, steps in self.tables.items()} if self.sft.scored else {}

    @property
    def aims(self) -> dict[str, float | None]:
        """β of the optimum that each method aims at whose density ratios are known."""
        return {name: self.run.describe(name)[1] for name in self.density}

    @property
    def evaluate(self) -> dict[str, Any]:
        return self.recipe.get("evaluate") or {}

    @property
    def kl_budget(self) -> float | None:
        return self.evaluate.get("kl_budget")

    @property
    def opponents(self) -> dict[str, SampleTable]:
        """Whom win rates are against, by name."""
        if not self.sft.scored:
            return {}
        sft = {} if 0 not in self.judged[SFT] else {SFT: self.judged[SFT][0]}
        return sft | ({} if self.reference is None else {REFERENCE_TEXTS: self.reference})

    def _complete(self, folder: Path) -> list[Record] | None:
        records = complete_records(folder)
        if records is None:
            self.notes.append(f"{self.run.relative(folder)} is incomplete and left out.")
        return records

    def _read_answers(self, policy: str, step: int, folder: Path, records: list[Record], table: SampleTable) -> None:
        """What win rates and judges take: the samples, or where the run draws answers for that, these."""
        judged = self.judged.setdefault(policy, {})
        if (answered := self.run.answered(folder)) != folder:
            found = self._complete(answered)
            if found is None:
                return
            records, table = found, tabulate(found, self.run.relative(answered))
        judged[step], self.answers[policy] = table, records

    def _read_method(self, method: str) -> None:
        self.tables[method], self.first_samples[method] = {}, {}
        for step in self.run.sampled_steps(method):
            folder = self.run.samples(method, step)
            where, records = self.run.relative(folder), self._complete(folder)
            if records is None:
                continue
            table = tabulate(records, where)
            if table.empty_prompts:
                self.notes.append(f"{where}: {table.empty_prompts} prompts have no sample and are left out.")
            if table.log_ratios is None:
                if any(c.logprob is None for record in records for c in record.completions):
                    raise InputError(f"{where}: samples have no logprob; evaluate again.")
                self.notes.append(f"{where}: {method} writes in other tokens than the supervised policy: no KL.")
            if table.scored != self.sft.scored:
                raise InputError(f"{where}: of its samples and the supervised policy's only one side has rewards.")
            self.tables[method][step] = table
            self._read_answers(method, step, folder, records, table)
            first = [replace(record, completions=record.completions[:1]) for record in records]
            self.first_samples[method][step] = first
        for stop in sorted(self.run.align(method).glob("**/held-out.json")):
            what = "" if stop.parent == self.run.align(method) else f" {stop.parent.name}"
            self.notes.append(f"{method}{what}: {read_json(stop)['sentence']}.")
        if not self.tables[method]:
            self.notes.append(f"{method} has no evaluated checkpoint.")

    def _read_pairs(self, method: str) -> None:
        self.held_out[method] = {}
        if not self.run.counts(self.run.evaluation / "pairs" / method):
            return
        for step in self.run.paired_steps(method):
            folder = self.run.pairs(method, step)
            where, records = self.run.relative(folder), self._complete(folder)
            if records is None:
                continue
            if all(record.preferred is None and record.rewards is not None for record in records):
                if (answers := tabulate_labels(records, where)) is None:
                    self.notes.append(f"{where}: all held-out answers have one label, so nothing can be measured.")
                else:
                    self.held_out[method][step] = held_out_labels(answers, self.bootstrap)
                    labelled = (
                        f"{method} read held-out answers: a pair is one with a higher label and one with a lower."
                    )
                    if labelled not in self.notes:
                        self.notes.append(labelled)
                continue
            table = tabulate_pairs(records, where)
            self.held_out[method][step] = held_out(table, self.bootstrap)
            if table.undecided:
                self.notes.append(f"{where}: {table.undecided} pairs prefer neither text and are left out.")

    def _note_missing(self) -> None:
        if self.sft.empty_prompts:
            self.notes.append(f"{self.sft.empty_prompts} prompts have no sample of the supervised policy.")
        if not self.sft.scored:
            self.notes.append(
                "The run has no scorer: there are no rewards, hence no win rates, optimum, best of N or comparison at "
                "equal KL; methods are compared on held-out preferences."
            )
            return
        if self.reference is None:
            self.notes.append("There are no scored reference texts, so no win rate against them.")
        if not self.pool_rewards:
            self.notes.append("There is no pool of supervised samples, so no estimate of the optimal frontier.")
        elif self.pool is None:
            self.notes.append("All pooled samples of a prompt have the same reward, so every policy is optimal.")


def _point(material: _Material, table: SampleTable, step: int) -> FrontierPoint:
    return frontier_point(table, step=step, rewards_are_log_odds=material.log_odds, bootstrap=material.bootstrap)


def _method(material: _Material, name: str) -> MethodEvidence:
    tables, paired, scored = material.tables[name], material.held_out[name], material.sft.scored
    bootstrap = material.bootstrap
    described, beta = material.run.describe(name)
    points, rates = list[FrontierPoint](), dict[str, WinRate | None]()
    for step, table in tables.items():
        rates = _rates(material, name, step)
        point = _point(material, table, step)
        moved = changes(table, material.sft, bootstrap)
        share = _objective_share(material, described, beta, step)
        point = replace(point, gain=moved.pop("reward", None), changes=moved, objective=share)
        points.append(replace(point, held_out=paired.get(step), win_vs_sft=rates.get(SFT)))
    if points and not scored and not paired:
        material.notes.append(f"{name} did not read held-out pairs, so nothing is known of its preferences.")
    material.notes += [f"{name} and {who} share no prompt, so no win rate." for who in rates if rates[who] is None]
    gap = None
    if material.pool is not None and scored:
        known = [table for table in tables.values() if table.log_ratios is not None]
        gap = gap_to_optimum(material.pool, material.sft, known, bootstrap)
    selected = None if material.kl_budget is None else select_within(points, material.kl_budget)
    return replace(
        described,
        points=points,
        win_rates=[rate for rate in rates.values() if rate is not None],
        gain=points[-1].gain if points else None,
        gap=gap,
        selected_step=selected.step if selected else None,
        aim=_aim(material, beta),
        by_category=_by_category(material, name, points[-1].step) if points else {},
        by_part={
            part: [rate for rate in _rates(material, name, points[-1].step, part=part).values() if rate is not None]
            for part in (points[-1].parts if points else ())
        },
    )


def _rates(
    material: _Material, name: str, step: int, among: Collection[str] | None = None, part: str | None = None
) -> dict[str, WinRate | None]:
    """Win rates of a policy's answers, by opponent: on all prompts, also at equal length, or on those `among` these.

    By the reward, or by one `part` of it, of opponents who have that.
    """
    ours, opponents = material.judged.get(name, {}).get(step), material.opponents
    if ours is None or (part is not None and part not in ours.parts):
        return {}
    if part is not None:
        ours, *others = (replace(t, rewards=t.parts.get(part, ())) for t in (ours, *opponents.values()))
        opponents = {who: table for who, table in zip(opponents, others, strict=True) if table.rewards}

    def chosen(table: SampleTable) -> dict[str, Array]:
        return {key: rewards for key, rewards in table.by_prompt.items() if among is None or key in among}

    found = {
        who: win_rate(chosen(ours), chosen(table), opponent=who, bootstrap=material.bootstrap)
        for who, table in opponents.items()
    }
    for who, rate in found.items():
        if rate is not None and among is None:
            found[who] = replace(rate, at_equal_length=at_equal_length(ours, opponents[who], material.bootstrap))
    return found


def _by_category(material: _Material, name: str, step: int) -> dict[str, list[WinRate]]:
    column = material.evaluate.get("category")
    ids: dict[str, set[str]] = {}
    for record in material.prompts if column is not None else ():
        kind = (record.columns or {}).get(str(column))
        ids.setdefault("none" if kind is None else str(kind), set()).add(record.id)
    found = {kind: _rates(material, name, step, among) for kind, among in sorted(ids.items())}
    return {kind: [rate for rate in rates.values() if rate is not None] for kind, rates in found.items()}


def _objective_share(material: _Material, method: MethodEvidence, beta: float | None, step: int) -> Interval | None:
    """That of a policy in the objective at its own β, which a sweep has for each, and a recipe says of given ones."""
    beta = beta if method.sweep is None else method.sweep.betas[step - 1]
    aimed_at = material.aimed_at or (material.pool is not None and method.target is None)
    if beta is None or not material.sft.scored or not aimed_at:
        return None
    policy = material.tables[method.name][step]
    return objective_share(material.pool_rewards, beta, material.sft, policy, material.bootstrap)


def _aim(material: _Material, beta: float | None) -> OptimumPoint | None:
    """π*_β of the reward that methods were trained on, as the pool shows it."""
    if beta is None:
        return None
    found = pool_frontier(material.trained_rewards, np.array([beta]), judged=material.pool_rewards)
    return None if found is None else optimum(found, material.bootstrap).points[0]


def _misled(material: _Material, kl: float) -> list[str]:
    """How far the reward leads that was trained on: at `kl` nats, or as far as the pool shows it."""
    if material.pool is None or material.proxy is None:
        return []
    both = material.pool, material.proxy
    kl = min([kl, *(float(optimum_path(found)[0].mean(axis=0).max()) for found in both if not found.ends)])
    share = proxy_share(material.proxy, material.pool, kl, material.bootstrap)
    return [] if share is None else misled(kl, share)


def choose_examples(
    prompts: Sequence[Record],
    answers: Mapping[str, Sequence[Record]],
    number: int,
    seed: int,
    remarks: Sequence[Remark] = (),
) -> list[Example]:
    """Prompts drawn with `seed`, never by reward, from those that every policy answered, with each one's first sample.

    `answers` maps a policy's name to its records; `prompts` may carry a reference text each. Prompts with `remarks` on
    these answers, which judges drew by chance too, come before others.
    """
    by_id = {name: {r.id: r for r in records if r.completions} for name, records in answers.items()}
    given = {record.id: record for record in prompts}
    known = {record.id: record for records in answers.values() for record in records} | given
    shared = [key for key in known if all(key in records for records in by_id.values())]
    if not by_id or not shared:
        return []
    judged = {remark.prompt_id for remark in remarks if {remark.a, remark.b} <= {REFERENCE_TEXT, *answers}}
    by_chance = np.random.default_rng(seed).permutation(len(shared))
    drawn = sorted(by_chance, key=lambda i: shared[i] not in judged)[:number]
    examples = []
    for key in (shared[i] for i in sorted(drawn)):
        rows = [_answer(name, records[key].completions[0]) for name, records in by_id.items()]
        if key in given and given[key].completions:
            rows.insert(0, _answer(REFERENCE_TEXT, given[key].completions[0]))
        shown = {row.source for row in rows}
        said = [remark for remark in remarks if remark.prompt_id == key and {remark.a, remark.b} <= shown]
        examples.append(Example(key, render_prompt(known[key].prompt), rows, said))
    return examples


def _courses(material: _Material, methods: Sequence[MethodEvidence], seed: int) -> Iterator[Course]:
    """Of every method with several checkpoints, some of them evenly from the first to the last."""
    for method in methods:
        steps = [*material.first_samples[method.name]]
        if len(steps) < 2:
            continue
        places = np.linspace(0, len(steps) - 1, min(len(steps), COURSE_STEPS)).round().astype(int)
        shown = {method.at(steps[i]): material.first_samples[method.name][steps[i]] for i in places}
        answers = {SFT: material.samples} | shown
        examples = choose_examples([], answers, NUM_COURSE, seed)
        if examples:
            yield Course(method.name, examples)


def _worst(theirs: Sequence[Record], ours: Sequence[Record], method: str) -> list[Example]:
    """The prompts whose worst sample lies furthest below the mean reward of π_sft, with that sample; none unscored."""
    known = {record.id: record for record in theirs if record.rewards}
    lost = []
    for record in ours:
        if record.rewards and record.id in known:
            worst = int(np.argmin(record.rewards))
            lost.append((record.rewards[worst] - float(np.mean(known[record.id].rewards or ())), record, worst))
    return [
        Example(
            record.id,
            render_prompt(record.prompt),
            [_answer(SFT, known[record.id].completions[0]), _answer(method, record.completions[worst])],
        )
        for gain, record, worst in sorted(lost, key=lambda row: row[0])[:NUM_WORST]
        if gain < 0
    ]


def _answer(source: str, completion: Completion) -> Answer:
    return Answer(source, completion.text, completion.reward, log_ratio(completion), completion.finish_reason)


def _answers_drawn(said: Mapping[str, Any] | None) -> str | None:
    if said is None:
        return None
    top_p = said.get("top_p")
    return f"at a temperature of {said['temperature']:g}" + ("" if top_p is None else f" with top-p {top_p:g}")


def _scorers(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What gave the rollouts their rewards, and what judged the evaluation; empty where nothing did."""

    def named(section: str, stage: str) -> dict[str, Any]:
        scorer = (recipe.get(section) or {}).get("scorer") or ({"stage": stage} if recipe.get(stage) else {})
        return {name: value for name, value in scorer.items() if value is not None}

    trained = named("score", "reward")
    return trained, named("evaluate", "oracle") or trained
