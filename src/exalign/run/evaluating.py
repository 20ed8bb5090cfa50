"""The stages that turn aligned models into evidence: samples of every saved policy, scored, and the report.

evaluation/prompts → evaluation/sft → evaluation/pool → evaluation/proxy → evaluation/METHOD … → evaluation/answers/… →
evaluation/pairs/… → evaluation/density/… → report. What is judged is drawn in a stage before, evaluation/drawn/….
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
from exalign.evaluation.run_folder import DRAWN
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

POOL, PROXY, PAIRS = "evaluation/pool", "evaluation/proxy", "evaluation/pairs"
ROWS = f"{DRAWN}prompts"


def evaluation_stages(recipe: Recipe) -> Iterator[Stage]:
    """Every stage after alignment; none where there is nothing to align."""
    stages = [*_evaluation_stages(recipe)] if recipe.align else []
    yield from stages
    if stages:
        before = tuple(stage.name for stage in stages[1:])
        yield Takes(("seed",), before).stage("report", _report, always=True)


def _evaluation_stages(recipe: Recipe) -> Iterator[Stage]:
    settings, judge, supervised = recipe.evaluate, judging(recipe), takes_supervised(recipe)
    rows, first = takes_evaluation(recipe), Takes(("evaluate.first_prompt",))

    def judged(place: str, name: str, scorer: Scoring) -> Stage:
        takes = scorer.takes + Takes(needs=(f"{DRAWN}{name}",))
        return takes.stage(place, partial(_judged, scorer=scorer, drawn=f"{DRAWN}{name}"), shared=True)

    def drawn(name: str, takes: Takes, work: Callable[[View], None]) -> Iterator[Stage]:
        """Samples, and where there is a judge the same with their rewards."""
        yield takes.stage(f"evaluation/{name}" if judge is None else f"{DRAWN}{name}", work, shared=True)
        if judge is not None:
            yield judged(f"evaluation/{name}", name, judge)

    def of_each(takes: Takes) -> Iterator[tuple[str, Takes]]:
        """What a stage of its own for each method takes, so that one that is added later changes no other's."""
        return ((name, takes + Takes(needs=(f"align/{name}",))) for name in recipe.align)

    yield (rows + first + Takes(("evaluate.prompts", "evaluate.category"))).stage(ROWS, _rows)
    takes, scorer = Takes(needs=(ROWS,)) + (Takes() if judge is None else judge.takes), recipe.judging
    log_odds = scorer is not None and (scorer.classifier is not None or scorer.stage == "oracle")
    yield takes.stage("evaluation/prompts", partial(_prompts, judge=judge, log_odds=log_odds))
    sampled = supervised + Takes((*SAMPLED, "evaluate.samples"), (ROWS,))
    yield from drawn("sft", sampled, _supervised)
    if settings.pool_prompts and judge is not None:
        takes = supervised + rows + first + Takes((*SAMPLED, "evaluate.pool_prompts", "evaluate.pool_samples"))
        yield from drawn("pool", takes, _pool)
        if (trained := proxy(recipe)) is not None:
            yield judged(PROXY, "pool", trained)
    for name, own in of_each(sampled):
        yield from drawn(name, own, partial(_method, name=name))
    if settings.answers is not None:  # drawn for win rates and judges alone
        reads = tuple(path for path in sampled.reads if path != "temperature")
        takes = Takes((*reads, "evaluate.answers"), sampled.needs)
        yield from drawn("answers/sft", takes, partial(_supervised, answers=True))
        for name, own in of_each(takes):
            yield from drawn(f"answers/{name}", own, partial(_method, name=name, answers=True))
    if reads_pairs(recipe):
        takes = supervised + Takes(("temperature", *LIMITS))
        read = partial(_pairs, labels=judge is None)
        yield (takes + rows + Takes(("evaluate.pairs",))).stage(PAIRS, read, shared=True)
        for name, own in of_each(takes + Takes(needs=(PAIRS,))):
            yield own.stage(f"{PAIRS}/{name}", partial(_pairs_of, name=name), shared=True)
    if settings.pool_prompts and settings.density_prompts and judge is not None:
        takes = supervised + Takes(("temperature", "evaluate.density_prompts"), (POOL,))
        for name, own in of_each(takes):
            yield own.stage(f"evaluation/density/{name}", partial(_density, name=name), shared=True)


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


def _rows(view: View) -> None:
    """The evaluation's rows, one for each prompt, with all that the data says of it."""
    evaluate = view.recipe.evaluate
    records = _first_rows(view, evaluate.prompts)
    if not records:
        raise InputError("data.evaluation has no usable rows.")
    category = evaluate.category
    if category is not None and not any(category in (record.columns or {}) for record in records):
        raise InputError(f"evaluate.category: no evaluation prompt has a column {category!r}.")
    view.counts["prompts"] = len(records)
    _write(view, records, Header(counts=dict(view.counts)))


def _prompts(view: View, *, judge: Scoring | None, log_odds: bool) -> None:
    """The evaluation prompts, each with its reference text (scored) where the data has one.

    What the data says of its texts, preferences and labels, is what the scorer is held to.
    """
    records = read_records(view.path(ROWS))
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
    header = read_header(view.path(ROWS)).with_counts(view.counts)
    _write(view, [_with_reference_text(record) for record in records], header)


def _write(view: View, records: Sequence[Record], header: Header) -> None:
    """Records in the stage's folder itself, beside what it is marked with."""
    with RecordWriter(view.folder) as writer:
        for record in records[writer.written :]:
            writer.write(record)
        writer.close(header)


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
    return [replace(record, completions=(), preferred=None) for record in read_records(view.path(ROWS))]


def _wanted(view: View, purpose: str, answers: bool) -> Wanted:
    """Samples at τ from the whole distribution, with log π_sft; or answers, as the recipe has them drawn."""
    settings, said = evaluation_sampling(view, view.recipe.evaluate.samples), None
    if answers and (said := view.recipe.evaluate.answers) is not None:
        settings = settings.model_copy(update={"top_p": said.top_p})
    purpose = purpose if said is None else f"answers {purpose}"
    return Wanted(_evaluation_prompts(view), settings, purpose, None if said is None else said.temperature)


def _supervised(view: View, *, answers: bool = False) -> None:
    tokenizer, wanted = run_tokenizer(view), _wanted(view, "evaluation", answers)
    model = supervised(view, tokenizer)
    reference = model if wanted.temperature is None else None
    draw(view, model, tokenizer, wanted, view.folder / "samples", reference=reference)


def _pool(view: View) -> None:
    """Many samples of π_sft for some prompts: what the optimal frontier is estimated from.

    Trainings that aim at a KL read it, so it does not depend on how many prompts are evaluated.
    """
    evaluate, tokenizer = view.recipe.evaluate, run_tokenizer(view)
    rows = _first_rows(replace(view, counts=Counter()), evaluate.pool_prompts)
    prompts = [replace(row, completions=(), preferred=None) for row in rows]
    wanted = Wanted(prompts, evaluation_sampling(view, evaluate.pool_samples), "pool")
    draw(view, supervised(view, tokenizer), tokenizer, wanted, view.folder)


def _method(view: View, *, name: str, answers: bool = False) -> None:
    sample_policies(view, view.path(f"align/{name}"), _wanted(view, f"evaluation {name}", answers), view.folder)


def _judged(view: View, *, scorer: Scoring, drawn: str) -> None:
    """The samples of another stage with their rewards, in folders of the same names."""
    loaded, source = scorer.load(view), view.path(drawn)
    for samples in gathered(sorted(header.parent for header in source.rglob("header.json")))[0]:
        place, header = view.folder / samples.relative_to(source), read_header(samples)
        write_shared(view, place, samples, partial(scored, loaded), header)
        view.counts["completions"] += header.counts.get("completions", 0)


def sample_policies(view: View, trained: Path, wanted: Wanted, folder: Path, judge: Scoring | None = None) -> None:
    """Samples of every policy that was saved along the way of `trained`, in `folder`/step-NNNNNN/samples."""
    tokenizer = run_tokenizer(view)
    reference = supervised(view, tokenizer) if wanted.temperature is None else None
    scorer = None if judge is None else judge.load(view)
    for policy in gathered(saved_policies(trained))[0]:  # as the first process sees the folder
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


def _pairs(view: View, *, labels: bool) -> None:
    """Held-out preferences with their token ids and log π_sft; `labels`: answers with a label, where there is none.

    None where the evaluation's rows have neither.
    """
    tokenizer, temperature = run_tokenizer(view), view.recipe.temperature
    known, answers, most = list[Record](), list[Record](), view.recipe.evaluate.pairs
    for record in evaluation_rows(view):
        if len(known) == most:
            break
        if record.preferred is not None:
            known.append(record)
        elif labels and record.rewards is not None and len(record.completions) == 1 and len(answers) < most:
            answers.append(record)
    known = known or answers
    models = dict[str, PreTrainedModel]()
    if known:
        known, models = with_ids(view, known, tokenizer), {"reference_logprob": supervised(view, tokenizer)}
    view.counts["answers" if answers and known is answers else "pairs"] = len(known)
    header = Header(temperature=temperature, counts=dict(view.counts))
    write_shared(view, view.folder / "records", known, read_by(Numerics(temperature), **models), header)


def _pairs_of(view: View, *, name: str) -> None:
    """log π_θ (as `logprob`) of the held-out pairs under every saved policy."""
    records, tokenizer = read_records(view.path(PAIRS, "records")), run_tokenizer(view)
    header = Header(temperature=view.recipe.temperature)
    for policy in gathered(saved_policies(view.path(f"align/{name}")))[0] if records else ():
        if own_tokenizer(view, policy, tokenizer) is not None:
            continue
        read = read_by(Numerics(view.recipe.temperature), logprob=frozen_policy(view, policy, tokenizer))
        write_shared(view, view.folder / policy.name, records, read, header)
    view.counts["pairs" if all(record.preferred is not None for record in records) else "answers"] = len(records)


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
    judgements, own = read_judgements(view.run), view.stage.needs
    evidence = build_evidence(view.run, seed=view.recipe.seed, judgements=judgements, stages=own)
    page = write_report(view.run)
    for sentence in evidence.warnings:
        view.console.print(shown(f"  ! {sentence}", "yellow"), soft_wrap=True)
    view.console.print(shown("Report: ").append_text(shown(page, "bold")), soft_wrap=True)
