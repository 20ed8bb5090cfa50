"""The stages that turn aligned models into evidence: samples of every saved policy, scored, and the report.

evaluation/prompts → evaluation/sft → evaluation/pool → evaluation/METHOD … → evaluation/density/METHOD … → report
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from exalign.data.record import Completion, Record
from exalign.data.store import Header, RecordWriter, read_header, read_records, write_records
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence
from exalign.judging.judgements import read_judgements
from exalign.report import write_report
from exalign.rollout.scorers import scored
from exalign.rollout.settings import SampleSettings, ScorerSettings
from exalign.run.density_stage import density_stages
from exalign.run.on_demand import (
    sample_policy,
    sample_supervised,
    sampled_logprobs,
    shards,
    with_reference_logprobs,
)
from exalign.run.recipe import Recipe
from exalign.run.runner import Run, Stage
from exalign.run.sources import (
    data_identity,
    iter_records_of,
    load_frozen_policy,
    load_run_tokenizer,
    load_scorer,
    load_supervised,
    model_identity,
    ready,
    scorer_identity,
    scorer_needs,
    supervised_needs,
)
from exalign.storage import fingerprint
from exalign.terminal import shown


def evaluation_stages(recipe: Recipe) -> Iterator[Stage]:
    """Every stage after alignment; none where there is nothing to align."""
    if not recipe.methods:
        return
    settings, supervised = recipe.evaluate, supervised_needs(recipe)
    scorer = evaluation_scorer(recipe)
    scored = scorer_needs(scorer)
    drawn = [recipe.seed, recipe.temperature, model_identity(recipe), scorer_identity(scorer)]
    drawn += [evaluation_sampling(recipe, settings.samples).model_dump(exclude={"batch_completions"}), settings.samples]
    chosen = [data_identity(recipe.data.evaluation), settings.prompts, scorer_identity(scorer)]
    yield Stage("evaluation/prompts", scored, lambda: chosen, _prompts)
    needs = ("evaluation/prompts", *supervised, *scored)
    yield Stage("evaluation/sft", needs, lambda: drawn, _supervised)
    if settings.pool_prompts:
        pool = [settings.pool_prompts, settings.pool_samples]
        yield Stage("evaluation/pool", needs, lambda: [drawn, pool], _pool)
    for method in recipe.methods:
        yield Stage(f"evaluation/{method}", (*needs, f"align/{method}"), lambda: drawn, partial(_method, method=method))
    density = list(density_stages(recipe))
    yield from density
    before = ["evaluation/sft", *(["evaluation/pool"] if settings.pool_prompts else [])]
    before += [f"evaluation/{method}" for method in recipe.methods] + [stage.name for stage in density]
    yield Stage("report", tuple(before), lambda: None, _report, always=True)


def evaluation_scorer(recipe: Recipe) -> ScorerSettings:
    """What judges the samples: as the recipe says, else the oracle, else what scored the rollouts."""
    if recipe.evaluate.scorer is not None:
        return recipe.evaluate.scorer
    return ScorerSettings(stage="oracle") if recipe.oracle is not None else recipe.score.scorer


def evaluation_sampling(recipe: Recipe, samples: int) -> SampleSettings:
    """M samples at the training τ from the whole distribution, whatever the rollouts were cut to."""
    return recipe.sample.model_copy(update={"num_completions": samples, "top_p": None, "top_k": None})


def _prompts(run: Run, folder: Path, counts: Counter[str]) -> None:
    """The evaluation prompts, each with its reference text (scored) where the data has one."""
    recipe = run.recipe
    assert recipe.data.evaluation is not None
    rows = iter_records_of(recipe.data.evaluation, run, counts)
    records = list(islice(different_prompts(rows), recipe.evaluate.prompts))
    if not records:
        raise InputError(f"data.evaluation: {recipe.data.evaluation.source} has no usable rows.")
    chosen = [_with_reference_text(record) for record in records]
    if all(record.completions for record in chosen):
        chosen = scored(load_scorer(evaluation_scorer(recipe), run), chosen, counts)
    else:
        chosen = [replace(record, completions=(), preferred=None) for record in chosen]
    counts["prompts"] = len(chosen)
    write_beside_the_stage(folder, chosen, Header(counts=dict(counts)))


def different_prompts(records: Iterable[Record]) -> Iterator[Record]:
    """The first record of every prompt."""
    seen: set[str] = set()
    for record in records:
        print_ = fingerprint(record.prompt)
        if print_ not in seen:
            seen.add(print_)
            yield record


def write_beside_the_stage(folder: Path, records: list[Record], header: Header) -> None:
    """Write records into a stage's own folder, next to the file that says how far the stage is."""
    for shard in folder.glob("part-*.parquet"):
        shard.unlink()
    with RecordWriter(folder) as writer:
        for record in records:
            writer.write(record)
        writer.close(header)


def _with_reference_text(record: Record) -> Record:
    """K = 1: the preferred completion, or the only one; several without a preference give no reference text."""
    completions: tuple[Completion, ...] = ()
    if record.preferred is not None:
        completions = (record.completions[record.preferred],)
    elif len(record.completions) == 1:
        completions = record.completions
    return replace(record, completions=completions, preferred=None)


def _evaluation_prompts(run: Run) -> list[Record]:
    return [replace(record, completions=()) for record in read_records(run.path("evaluation", "prompts"))]


def _supervised(run: Run, folder: Path, counts: Counter[str]) -> None:
    prompts, settings = _evaluation_prompts(run), evaluation_sampling(run.recipe, run.recipe.evaluate.samples)
    counts.update(sample_supervised(run, prompts, settings, folder=folder / "drawn", purpose="evaluation"))
    counts.update(score_drawn(run, folder / "drawn", folder / "samples"))


def _pool(run: Run, folder: Path, counts: Counter[str]) -> None:
    """Many samples of π_sft for some prompts: what the optimal frontier is estimated from."""
    settings = evaluation_sampling(run.recipe, run.recipe.evaluate.pool_samples)
    prompts = _evaluation_prompts(run)[: run.recipe.evaluate.pool_prompts]
    counts.update(sample_supervised(run, prompts, settings, folder=folder / "drawn", purpose="pool"))
    records = scored(load_scorer(evaluation_scorer(run.recipe), run), read_records(folder / "drawn"), counts)
    write_beside_the_stage(folder, records, Header(temperature=run.recipe.temperature, counts=dict(counts)))


def _method(run: Run, folder: Path, counts: Counter[str], *, method: str) -> None:
    prompts, settings = _evaluation_prompts(run), evaluation_sampling(run.recipe, run.recipe.evaluate.samples)
    trained = run.path("align", method)
    score_policies(run, trained, prompts, settings, folder, counts, purpose=f"evaluation {method}")


def score_policies(
    run: Run,
    trained: Path,
    prompts: list[Record],
    settings: SampleSettings,
    folder: Path,
    counts: Counter[str],
    *,
    purpose: str,
) -> None:
    """Samples of every policy that was saved along the way of `trained`, scored, in `folder`/step-NNNNNN/samples."""
    tokenizer = load_run_tokenizer(run)
    for policy in sorted((trained / "policies").glob("step-*")):
        here = folder / policy.name
        if all((here / name / "header.json").exists() for name in ("drawn", "samples")):
            counts.update(read_header(here / "samples").counts)
            continue
        model = load_frozen_policy(policy, run, tokenizer)
        seeds = f"{purpose} {policy.name}"
        counts.update(sample_policy(run, model, tokenizer, prompts, settings, folder=here / "drawn", purpose=seeds))
        counts.update(score_drawn(run, here / "drawn", here / "samples"))


def score_drawn(run: Run, drawn: Path, samples: Path) -> Counter[str]:
    """Rewards and log π_sft for what was drawn; what the scorer cut."""
    tokenizer = load_run_tokenizer(run)
    scorer = load_scorer(evaluation_scorer(run.recipe), run)
    model = ready(load_supervised(run, tokenizer))
    done: list[Record] = []
    cut: Counter[str] = Counter()
    for shard in shards(read_records(drawn)):
        logps = sampled_logprobs(run, model, tokenizer, shard)
        done += with_reference_logprobs(scored(scorer, shard, cut), logps)
    write_records(samples, done, read_header(drawn).with_counts(cut))
    return cut


def _report(run: Run, folder: Path, counts: Counter[str]) -> None:
    build_evidence(run.folder, seed=run.recipe.seed, judgements=read_judgements(run.folder))
    page = write_report(run.folder)
    run.console.print(shown("Report: ").append_text(shown(page, "bold")), soft_wrap=True)
