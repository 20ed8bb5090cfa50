"""A run folder in, its evidence out: `evaluation/evidence.json`, from which the report is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exalign.data.record import Record
from exalign.data.store import read_header
from exalign.errors import InputError
from exalign.evaluation.best_of_n import best_of_n
from exalign.evaluation.comparison import Paths, compare_all, compare_pairs, reward_gain
from exalign.evaluation.density_ratio import density_ratios
from exalign.evaluation.examples import choose_examples
from exalign.evaluation.frontier import frontier_point, select_within
from exalign.evaluation.optimum import PoolFrontier, gap_to_optimum, optimum, pool_frontier
from exalign.evaluation.run_folder import RunFolder, complete_records, pool_rewards
from exalign.evaluation.schema import Evidence, FrontierPoint, Judgements, MethodEvidence, WinRate, write_evidence
from exalign.evaluation.statistics import CONFIDENCE, NUM_RESAMPLES
from exalign.evaluation.tables import SampleTable, tabulate
from exalign.evaluation.winrate import win_rate

SFT = "SFT"
REFERENCE_TEXTS = "reference texts"


def build_evidence(run: Path, **options: Any) -> Evidence:
    """`collect_evidence`, with its options and errors, written to `evaluation/evidence.json`."""
    evidence = collect_evidence(run, **options)
    write_evidence(RunFolder(Path(run)).evidence, evidence)
    return evidence


def collect_evidence(
    run: Path,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    num_examples: int = 8,
    judgements: Judgements | None = None,
) -> Evidence:
    """Compute everything the report says about the run in folder `run`; nothing is written.

    Missing pieces (no pool, no reference texts, a method that was stopped, one method only) leave their part empty
    and a sentence in `notes`. `judgements` is what models and people said (`exalign.judging.evidence` reads it).
    Without samples of the supervised policy there is nothing to compare with: `InputError`.
    """
    folder = RunFolder(Path(run))
    judgements = Judgements() if judgements is None else judgements
    material = _Material.read(folder)
    options: dict[str, Any] = {"seed": seed, "num_resamples": num_resamples}
    log_odds = _rewards_are_log_odds(material.recipe)
    methods = [_method(material, name, log_odds, options) for name in material.methods]
    paths = Paths(material.sft, {name: list(steps.values()) for name, steps in material.tables.items()}, **options)
    finished = [method.name for method in methods if method.finished]
    density = density_ratios(material.density, {m.name: m.settings for m in methods}, material.notes, **options)
    counts: Counter[str] = Counter()
    curves = folder.curves(counts)
    header = read_header(folder.supervised)
    return Evidence(
        name=str(material.recipe.get("name") or folder.path.resolve().name),
        policy=(material.recipe.get("model") or {}).get("source"),
        temperature=header.temperature,
        kl_budget=_kl_budget(material.recipe),
        confidence=CONFIDENCE,
        num_prompts=len(material.sft.ids),
        sft=frontier_point(material.sft.as_reference(), step=0, rewards_are_log_odds=log_odds, **options),
        methods=methods,
        equal_kl=compare_all(paths, among=finished),
        comparisons=compare_pairs(paths),
        optimum=None if material.pool is None else optimum(material.pool, **options),
        best_of_n=best_of_n(material.pool_rewards, material.opponents, **options),
        examples=choose_examples(material.prompts, material.last_samples, num_examples=num_examples, seed=seed),
        curves=curves,
        stages=folder.stages(),
        record_counts=folder.record_counts(),
        notes=material.notes
        + [f"{name.replace('_', ' ')}: {n}" for name, n in sorted(counts.items()) if n]
        + judgements.notes,
        environment=folder.environment_values(),
        recipe=material.recipe_text,
        judgements=judgements,
        searches=folder.searches(),
        density=density,
        **options,
    )


@dataclass(eq=False)
class _Material:
    """What a run folder offers, read once; `notes` say what it lacks."""

    recipe_text: str
    recipe: dict[str, Any]
    run: RunFolder
    sft: SampleTable
    prompts: list[Record]
    reference: SampleTable | None
    pool_rewards: dict[str, list[float]]
    pool: PoolFrontier | None
    density: dict[str, list[Record]]
    methods: list[str]
    tables: dict[str, dict[int, SampleTable]] = field(default_factory=dict)
    last_samples: dict[str, list[Record]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, run: RunFolder) -> _Material:
        samples = complete_records(run.supervised)
        if samples is None:
            raise InputError(f"{run.supervised} is missing or incomplete; run the evaluate stage first.")
        prompts = complete_records(run.prompts) or []
        texts = [record for record in prompts if record.rewards is not None]
        pool = pool_rewards(run.pool)
        material = cls(
            recipe_text=run.recipe_text(),
            recipe=run.recipe_values(),
            run=run,
            sft=tabulate(samples, "evaluation/sft/samples"),
            prompts=prompts,
            reference=tabulate(texts, "evaluation/prompts") if texts else None,
            pool_rewards=pool,
            pool=pool_frontier(pool),
            density=run.density_records(),
            methods=run.methods(),
            last_samples={SFT: samples},
        )
        material._note_missing()
        for method in material.methods:
            material._read_method(method)
        return material

    @property
    def opponents(self) -> dict[str, SampleTable]:
        """Whom win rates are against, by name."""
        references = {} if self.reference is None else {REFERENCE_TEXTS: self.reference}
        return {SFT: self.sft, **references}

    def _read_method(self, method: str) -> None:
        self.tables[method] = {}
        for step in self.run.sampled_steps(method):
            folder = self.run.samples(method, step)
            where = self.run.relative(folder)
            records = complete_records(folder)
            if records is None:
                self.notes.append(f"{where} is incomplete and left out.")
                continue
            table = tabulate(records, where)
            if table.empty_prompts:
                self.notes.append(f"{where}: {table.empty_prompts} prompts have no sample and are left out.")
            if table.log_ratios is None:
                raise InputError(f"{where}: samples have no logprob and reference_logprob; evaluate again.")
            self.tables[method][step] = table
            self.last_samples[method] = records
        if not self.tables[method]:
            self.notes.append(f"{method} has no evaluated checkpoint.")

    def _note_missing(self) -> None:
        if self.sft.empty_prompts:
            self.notes.append(f"{self.sft.empty_prompts} prompts have no sample of the supervised policy.")
        if self.reference is None:
            self.notes.append("There are no scored reference texts, so no win rate against them.")
        if not self.pool_rewards:
            self.notes.append("There is no pool of supervised samples, so no estimate of the optimal frontier.")
        elif self.pool is None:
            self.notes.append("All pooled samples of a prompt have the same reward, so every policy is optimal.")


def _method(material: _Material, name: str, log_odds: bool, options: Mapping[str, Any]) -> MethodEvidence:
    tables = material.tables[name]
    points: list[FrontierPoint] = []
    for step, table in tables.items():
        against_sft = win_rate(table, material.sft, opponent=SFT, **options)
        points.append(
            frontier_point(table, step=step, rewards_are_log_odds=log_odds, win_vs_sft=against_sft, **options)
        )
    win_rates: list[WinRate] = []
    gain = None
    if points:
        last = tables[points[-1].step]
        gain = reward_gain(last, material.sft, **options)
        rates = [win_rate(last, table, opponent=who, **options) for who, table in material.opponents.items()]
        win_rates = [rate for rate in rates if rate is not None]
    gap = None
    if material.pool is not None:
        gap = gap_to_optimum(material.pool, material.sft, list(tables.values()), **options)
    budget = _kl_budget(material.recipe)
    selected = None if budget is None else select_within(points, budget)
    described = material.run.describe(name)
    return MethodEvidence(
        name=name,
        family=described.family,
        target=described.target,
        finished=material.run.is_finished(name),
        points=points,
        win_rates=win_rates,
        gain=gain,
        gap=gap,
        selected_step=selected.step if selected else None,
        settings=described.settings,
    )


def _kl_budget(recipe: Mapping[str, Any]) -> float | None:
    return (recipe.get("evaluate") or {}).get("kl_budget")


def _rewards_are_log_odds(recipe: Mapping[str, Any]) -> bool:
    """Whether the evaluation's scorer (the named one, else the oracle, else the score stage's) is a classifier."""
    named = (recipe.get("evaluate") or {}).get("scorer")
    if named is None and recipe.get("oracle"):
        return True
    scorer = named or (recipe.get("score") or {}).get("scorer") or {}
    return bool(scorer.get("classifier")) or scorer.get("stage") == "oracle"
