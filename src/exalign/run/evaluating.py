"""The stages that turn aligned models into evidence: samples of every saved policy, scored, and the report.

evaluation/prompts → evaluation/sft → evaluation/drawn → evaluation/pool → evaluation/proxy → evaluation/METHOD … →
evaluation/answers/… → evaluation/pairs/… → evaluation/density/METHOD … → report
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

from transformers import PreTrainedModel

from exalign.data.record import Completion, Record
from exalign.data.store import Header, RecordWriter, read_header, read_records
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence
from exalign.judging.judgements import read_judgements
from exalign.processes import gathered
from exalign.report.page import write_report
from exalign.rollout.rollout import Numerics
from exalign.rollout.scorers import scored
from exalign.run.materials import (
    LIMITS,
    SAMPLED,
    Scoring,
    Takes,
    Wanted,
    are_cut,
    different_prompts,
    draw,
    evaluation_sampling,
    frozen_policy,
    judging,
    own_tokenizer,
    read_by,
    records_of,
    run_tokenizer,
    scoring,
    supervised,
    takes_data,
    takes_supervised,
    with_ids,
    write_shared,
)
from exalign.run.recipe import Recipe, holds_out, samples_are_scored, trained_on
from exalign.run.view import Stage, View
from exalign.terminal import shown

DRAWN, POOL, PROXY, PAIRS = (f"evaluation/{name}" for name in ("drawn", "pool", "proxy", "pairs"))


def evaluation_stages(recipe: Recipe) -> Iterator[Stage]:
    """Every stage after alignment; none where there is nothing to align."""
    stages = [*_evaluation_stages(recipe)] if recipe.align else []
    yield from stages
    if stages:
        before = tuple(stage.name for stage in stages[1:])
        yield Takes(("seed",), before).stage("report", _report, always=True)


def _evaluation_stages(recipe: Recipe) -> Iterator[Stage]:
    settings, judge, supervised = recipe.evaluate, judging(recipe), takes_supervised(recipe)
    judged = Takes() if judge is None else judge.takes
    rows = takes_evaluation(recipe)

    def of_every_method(below: str, takes: Takes, work: Callable[..., None]) -> Iterator[Stage]:
        """A stage of its own for each, so that a method that is added later changes no other's."""
        for name in recipe.align:
            own = takes + Takes(needs=(f"align/{name}",))
            yield own.stage(f"evaluation/{below}{name}", partial(work, name=name), shared=True)

    takes = rows + judged + Takes(("evaluate.prompts", "evaluate.first_prompt", "evaluate.category"))
    scorer = recipe.judging
    log_odds = scorer is not None and (scorer.classifier is not None or scorer.stage == "oracle")
    yield takes.stage("evaluation/prompts", partial(_prompts, judge=judge, log_odds=log_odds))
    drawn = supervised + judged + Takes(SAMPLED)
    sampled = drawn + Takes(("evaluate.samples",), ("evaluation/prompts",))
    yield sampled.stage("evaluation/sft", partial(_supervised, judge=judge), shared=True)
    if settings.pool_prompts and judge is not None:
        takes = supervised + rows + Takes((*SAMPLED, "evaluate.first_prompt", "evaluate.pool_prompts"))
        yield (takes + Takes(("evaluate.pool_samples",))).stage(DRAWN, _drawn, shared=True)
        for place, rewards in ((POOL, judge), (PROXY, proxy(recipe))):
            if rewards is not None:
                yield (rewards.takes + Takes(needs=(DRAWN,))).stage(place, partial(_pool, scorer=rewards), shared=True)
    yield from of_every_method("", sampled, partial(_method, judge=judge))
    if settings.answers is not None:  # drawn for win rates and judges alone
        reads = tuple(path for path in sampled.reads if path != "temperature")
        takes = Takes((*reads, "evaluate.answers"), sampled.needs)
        yield takes.stage("evaluation/answers/sft", partial(_supervised, judge=judge, answers=True), shared=True)
        yield from of_every_method("answers/", takes, partial(_method, judge=judge, answers=True))
    if reads_pairs(recipe):
        takes = supervised + Takes(("temperature", *LIMITS))
        yield (takes + rows + Takes(("evaluate.pairs",))).stage(PAIRS, _pairs, shared=True)
        yield from of_every_method("pairs/", takes + Takes(needs=(PAIRS,)), _pairs_of)
    if settings.pool_prompts and settings.density_prompts and judge is not None:
        takes = supervised + Takes(("temperature", "evaluate.density_prompts"), (POOL,))
        yield from of_every_method("density/", takes, _density)


def proxy(recipe: Recipe) -> Scoring | None:
    """What rewards the training where the evaluation's rewards come from something else."""
    other = samples_are_scored(recipe) and recipe.scoring != recipe.judging
    return scoring(recipe) if other else None


def takes_evaluation(recipe: Recipe) -> Takes:
    """The evaluation's rows: given, or held out of the preferences."""
    return Takes(needs=("preferences",)) if holds_out(recipe) else takes_data(recipe, "evaluation")


def reads_pairs(recipe: Recipe) -> bool:
    """Whether held-out preferences are read: the run has any, and a method or a reader would look."""
    if judging(recipe) is None:
        return True
    there = recipe.data.preferences is not None or trained_on(recipe) == {"nothing"}
    return there and bool(trained_on(recipe) & {"preferences", "nothing"})


def evaluation_rows(view: View) -> Iterator[Record]:
    if view.has("preferences"):
        yield from read_records(view.path("preferences", "held-out"))
    else:
        yield from records_of(view, "evaluation")


def _prompts(view: View, *, judge: Scoring | None, log_odds: bool) -> None:
    """The evaluation prompts, each with its reference text (scored) where the data has one.

    What the data says of its texts, preferences and labels, is what the scorer is held to.
    """
    evaluate = view.recipe.evaluate
    records = _first_rows(view, evaluate.prompts)
    if not records:
        raise InputError("data.evaluation has no usable rows.")
    category = evaluate.category
    if category is not None:
        if not any(category in (record.columns or {}) for record in records):
            raise InputError(f"evaluate.category: no evaluation prompt has a column {category!r}.")
        for name in [name for name in view.counts if name.endswith(f"column {category} not used")]:
            del view.counts[name]  # readers do not know that it is
    having = [record for record in records if _with_reference_text(record).completions]
    if having:
        view.counts["prompts_without_reference_text"] = len(records) - len(having)
    if having and judge is not None:
        told = scored(judge.load(view), having, view.counts)
        view.counts.update(_agreement(having, told, log_odds))
        for part in told[0].completions[0].parts or ():
            by_part = [r.with_each("reward", [(c.parts or {})[part] for c in r.completions]) for r in told]
            view.counts.update(f"{what} by {part}" for what in _agreement(having, by_part, log_odds=False))
        by_id = {record.id: record for record in told}
        records = [by_id.get(record.id, record) for record in records]
    chosen = [_with_reference_text(record) for record in records]
    view.counts["prompts"] = len(chosen)
    with RecordWriter(view.folder) as writer:
        for record in chosen[writer.written :]:
            writer.write(record)
        writer.close(Header(counts=dict(view.counts)))


def _first_rows(view: View, number: int) -> list[Record]:
    """The evaluation's first rows, without ids of their prompts but where the run cut them itself."""
    rows = islice(in_order(evaluation_rows(view), view.recipe.evaluate.first_prompt), number)
    kept = not view.has("preferences") and are_cut(view.recipe.data.evaluation)
    # Another run's are of its template, and cut to its limit.
    return [row if kept else replace(row, prompt_ids=None) for row in rows]


def in_order(rows: Iterator[Record], first: str | None) -> Iterator[Record]:
    """The first record of every prompt; before all others the one whose text, or last message, begins with `first`."""
    records = different_prompts(rows)
    if first is None:
        return records
    before = list[Record]()
    for record in records:
        if (record.prompt if isinstance(record.prompt, str) else record.prompt[-1]["content"]).startswith(first):
            return chain([record], before, records)
        before.append(record)
    raise InputError(f"evaluate.first_prompt: no prompt of the evaluation begins with {first[:100]!r}.")


def _agreement(records: Sequence[Record], told: Sequence[Record], log_odds: bool) -> Iterator[str]:
    """Counts of held-out pairs, of labelled texts where rewards are `log_odds`, and of those a scorer has right.

    A preferred completion makes a pair with each other one of its prompt.
    """
    for record, rewards in zip(records, (one.rewards or [] for one in told), strict=True):
        if record.preferred is not None:
            for reward in (reward for k, reward in enumerate(rewards) if k != record.preferred):
                yield "pairs_scored"
                if rewards[record.preferred] >= reward:
                    yield "pairs_scored_right" if rewards[record.preferred] > reward else "pairs_scored_alike"
        elif log_odds and record.rewards in ([0.0], [1.0]):
            yield "labels_scored"
            if (rewards[0] > 0) == (record.rewards == [1.0]):
                yield "labels_scored_right"


def _with_reference_text(record: Record) -> Record:
    """K = 1: the preferred completion, or the only one; several without a preference give no reference text."""
    completions: tuple[Completion, ...] = ()
    if record.preferred is not None:
        completions = (record.completions[record.preferred],)
    elif len(record.completions) == 1:
        completions = record.completions
    return replace(record, completions=completions, preferred=None)


def _evaluation_prompts(view: View) -> list[Record]:
    return [replace(record, completions=()) for record in read_records(view.path("evaluation/prompts"))]


def _wanted(view: View, purpose: str, answers: bool) -> Wanted:
    """Samples at τ from the whole distribution, with log π_sft; or answers, as the recipe has them drawn."""
    settings, said = evaluation_sampling(view, view.recipe.evaluate.samples), None
    if answers and (said := view.recipe.evaluate.answers) is not None:
        settings = settings.model_copy(update={"top_p": said.top_p})
    purpose = purpose if said is None else f"answers {purpose}"
    return Wanted(_evaluation_prompts(view), settings, purpose, None if said is None else said.temperature)


def _supervised(view: View, *, judge: Scoring | None, answers: bool = False) -> None:
    tokenizer, wanted = run_tokenizer(view), _wanted(view, "evaluation", answers)
    model = supervised(view, tokenizer)
    scorer = None if judge is None else judge.load(view)
    reference = model if wanted.temperature is None else None
    draw(view, model, tokenizer, wanted, view.folder / "samples", scorer=scorer, reference=reference)


def _drawn(view: View) -> None:
    """Many samples of π_sft for some prompts: what the optimal frontier is estimated from.

    Trainings that aim at a KL read it, so it depends neither on how many prompts are evaluated nor on who judges.
    """
    evaluate, tokenizer = view.recipe.evaluate, run_tokenizer(view)
    rows = _first_rows(replace(view, counts=Counter()), evaluate.pool_prompts)
    prompts = [replace(row, completions=(), preferred=None) for row in rows]
    wanted = Wanted(prompts, evaluation_sampling(view, evaluate.pool_samples), "pool")
    draw(view, supervised(view, tokenizer), tokenizer, wanted, view.folder)


def _pool(view: View, *, scorer: Scoring) -> None:
    """The pool's samples with the evaluation's rewards, or with those that methods are trained on."""
    drawn = view.path(DRAWN)
    write_shared(view, view.folder, drawn, partial(scored, scorer.load(view)), read_header(drawn))


def _method(view: View, *, name: str, judge: Scoring | None, answers: bool = False) -> None:
    wanted = _wanted(view, f"evaluation {name}", answers)
    sample_policies(view, view.path(f"align/{name}"), wanted, view.folder, judge)


def sample_policies(view: View, trained: Path, wanted: Wanted, folder: Path, judge: Scoring | None) -> None:
    """Samples of every policy that was saved along the way of `trained`, scored, in `folder`/step-NNNNNN/samples."""
    tokenizer = run_tokenizer(view)
    reference = supervised(view, tokenizer) if wanted.temperature is None else None
    scorer = None if judge is None else judge.load(view)
    for policy in saved_policies(trained):
        here = folder / policy.name / "samples"
        if gathered((here / "header.json").exists())[0]:
            view.counts.update(read_header(here).counts)
            continue
        own = own_tokenizer(view, policy, tokenizer)
        model = frozen_policy(view, policy, own or tokenizer)
        of_policy = replace(wanted, purpose=f"{wanted.purpose} {policy.name}")
        if own is not None:  # ids of the run's tokenizer say nothing to it
            of_policy = replace(of_policy, prompts=[replace(one, prompt_ids=None) for one in wanted.prompts])
        comparable = reference if own is None else None
        draw(view, model, own or tokenizer, of_policy, here, scorer=scorer, reference=comparable)


def saved_policies(trained: Path) -> list[Path]:
    """The policies that were saved along the way of a training, in its order."""
    return sorted((trained / "policies").glob("step-*"))


def _pairs(view: View) -> None:
    """Held-out preferences with their token ids and log π_sft; none where the evaluation's rows have no preference."""
    tokenizer, temperature = run_tokenizer(view), view.recipe.temperature
    rows = (record for record in evaluation_rows(view) if record.preferred is not None)
    known = list(islice(rows, view.recipe.evaluate.pairs))
    models = dict[str, PreTrainedModel]()
    if known:
        known, models = with_ids(view, known, tokenizer), {"reference_logprob": supervised(view, tokenizer)}
    view.counts["pairs"] = len(known)
    header = Header(temperature=temperature, counts=dict(view.counts))
    write_shared(view, view.folder / "records", known, read_by(Numerics(temperature), **models), header)


def _pairs_of(view: View, *, name: str) -> None:
    """log π_θ (as `logprob`) of the held-out pairs under every saved policy."""
    records, tokenizer = read_records(view.path(PAIRS, "records")), run_tokenizer(view)
    header = Header(temperature=view.recipe.temperature)
    for policy in saved_policies(view.path(f"align/{name}")) if records else ():
        if own_tokenizer(view, policy, tokenizer) is not None:
            continue
        read = read_by(Numerics(view.recipe.temperature), logprob=frozen_policy(view, policy, tokenizer))
        write_shared(view, view.folder / policy.name, records, read, header)
    view.counts["pairs"] = len(records)


def _density(view: View, *, name: str) -> None:
    """log π_θ (as `logprob`) and log π_sft of the pool's samples, one after the other through the same code path."""
    tokenizer, temperature = run_tokenizer(view), view.recipe.temperature
    last = view.path(f"align/{name}", "model")
    if own_tokenizer(view, last, tokenizer) is not None:
        return
    pool = read_records(view.path(POOL))[: view.recipe.evaluate.density_prompts]
    models = {"reference_logprob": supervised(view, tokenizer), "logprob": frozen_policy(view, last, tokenizer)}
    header = replace(read_header(view.path(POOL)), counts={})
    write_shared(view, view.folder / "samples", pool, read_by(Numerics(temperature), **models), header)
    view.counts["samples"] = sum(len(record.completions) for record in pool)


def _report(view: View) -> None:
    evidence = build_evidence(view.run, seed=view.recipe.seed, judgements=read_judgements(view.run))
    page = write_report(view.run)
    for sentence in evidence.warnings:
        view.console.print(shown(f"  ! {sentence}", "yellow"), soft_wrap=True)
    view.console.print(shown("Report: ").append_text(shown(page, "bold")), soft_wrap=True)
