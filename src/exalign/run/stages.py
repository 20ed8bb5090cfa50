"""The stages of a recipe in order, and the work of those that prepare and align.

tokenizer → sft → oracle → preferences → reward → validation → rollouts → scored → reference/… → search/… → align/…
→ evaluation/… → report
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from exalign.data.batching import Group, group_of
from exalign.data.reading import read_source
from exalign.data.record import Record, pairs_from_rewards
from exalign.data.store import (
    Header,
    RecordWriter,
    iter_records,
    iter_shard,
    read_header,
    read_records,
    shards_of,
    write_records,
)
from exalign.data.tokenization import tokenize_records
from exalign.data.vocabulary import build_tokenizer
from exalign.errors import InputError
from exalign.methods.matching import train_align, with_reference_logp
from exalign.methods.oracle import train_classifier
from exalign.methods.reward_model import train_reward_model
from exalign.methods.sft import train_sft
from exalign.models.loading import load_classifier, load_policy, load_reward_model, load_tokenizer
from exalign.rollout.scorers import keep_limits, scored
from exalign.rollout.settings import SampleSettings, ScorerSettings
from exalign.run.evaluation_stages import evaluation_stages
from exalign.run.on_demand import SHARD, sample_supervised
from exalign.run.on_policy import rounds_stages
from exalign.run.ppo_stages import ppo_stages
from exalign.run.recipe import Recipe
from exalign.run.runner import Run, Stage, TrainingStage
from exalign.run.search import method_stages, validation_stage
from exalign.run.sources import (
    data_identity,
    load_run_tokenizer,
    load_scorer,
    load_supervised,
    model_identity,
    prompts_of,
    read_records_of,
    ready,
    scorer_identity,
    scorer_needs,
    seeded,
    supervised_needs,
    supervised_settings,
    tokenize,
    trained_limits,
)
from exalign.run.speed import record_training_speed
from exalign.run.workers import sample_by_workers, score_by_workers
from exalign.training.settings import AlignSettings


def plan(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe needs, each with what its content depends on."""
    methods = (*_alignment(recipe), *rounds_stages(recipe), *ppo_stages(recipe))
    return [*_preparation(recipe), *validation_stage(recipe), *methods, *evaluation_stages(recipe)]


def _preparation(recipe: Recipe) -> Iterator[Stage]:
    data = recipe.data
    base = {"seed": recipe.seed, "limits": [data.max_prompt_tokens, data.max_completion_tokens]}
    tokenizer: tuple[str, ...] = ()
    if recipe.tokenizer.vocab_size is not None:
        tokenizer = ("tokenizer",)
        made_from = [recipe.tokenizer.model_dump(), data_identity(data.sft)]
        yield Stage("tokenizer", (), lambda: made_from, _tokenizer)
    model = model_identity(recipe)
    if recipe.sft is not None:
        source = data.sft or data.preferences
        yield TrainingStage("sft", tokenizer, lambda: [base, model, _dump(recipe.sft), data_identity(source)], _sft)
    supervised = supervised_needs(recipe)
    if recipe.oracle is not None:
        labelled = data.labelled
        yield TrainingStage("oracle", tokenizer, lambda: [base, _dump(recipe.oracle), data_identity(labelled)], _oracle)
    if data.preferences is not None:
        yield Stage("preferences", (), lambda: data_identity(data.preferences), _given_preferences)
    elif recipe.preferences is not None:
        scorer = recipe.preferences.scorer
        inputs = [base, model, recipe.temperature, _dump(recipe.sample), scorer_identity(scorer), *_engine(recipe)]
        prompts = data_identity(data.prompts)
        needs = (*supervised, *scorer_needs(scorer))
        yield Stage("preferences", needs, lambda: [inputs, prompts], _sampled_preferences)
    if recipe.reward is not None:
        started = (*supervised, "preferences")
        yield TrainingStage("reward", started, lambda: [base, model, _dump(recipe.reward)], _reward)


def _alignment(recipe: Recipe) -> Iterator[Stage]:
    data, supervised = recipe.data, supervised_needs(recipe)
    at_once = {method: settings for method, settings in recipe.align.items() if settings.rounds == 1}
    targets = {settings.target for settings in at_once.values()}
    base = [recipe.seed, recipe.temperature, data.max_prompt_tokens, data.max_completion_tokens]
    model = model_identity(recipe)
    if "reward" in targets and data.rewards is not None:
        yield Stage("scored", (), lambda: data_identity(data.rewards), _given_rewards)
    elif "reward" in targets:
        needs = supervised if data.prompts is not None else (*supervised, "preferences")
        prompts = data_identity(data.prompts)
        drawn = [base, model, _dump(recipe.sample), prompts, *_engine(recipe)]
        yield Stage("rollouts", needs, lambda: drawn, _rollouts)
        scorer = recipe.score.scorer
        yield Stage("scored", ("rollouts", *scorer_needs(scorer)), lambda: scorer_identity(scorer), _scored)
    for name, settings in {reference_name(settings): settings for settings in at_once.values()}.items():
        source = "preferences" if settings.target == "preference" else "scored"
        work = partial(_reference, source=source, precision=settings.precision)
        yield Stage(name, (*supervised, source), lambda: [base, model], work)
    for method, settings in at_once.items():
        needs = (*supervised, reference_name(settings))
        yield from method_stages(recipe, method, needs, [base, model], _align)


def _engine(recipe: Recipe) -> list[str]:
    """What draws the samples, where it is not what draws them everywhere; how many workers do it changes nothing."""
    return ["vllm"] if recipe.cluster is not None and recipe.cluster.vllm is not None else []


def _dump(settings: Any) -> Any:
    return None if settings is None else settings.model_dump(mode="json")


def _tokenizer(run: Run, folder: Path, counts: Counter[str]) -> None:
    assert run.recipe.data.sft is not None and run.recipe.tokenizer.vocab_size is not None
    whole = run.recipe.data.sft.model_copy(update={"prompt_tokens": None})  # nothing can be split by tokens yet
    texts = (text for record in read_records_of(whole, run, counts) for text in texts_of(record))
    tokenizer = build_tokenizer(texts, vocab_size=run.recipe.tokenizer.vocab_size)
    tokenizer.save_pretrained(folder)
    counts["tokens_in_vocabulary"] = len(tokenizer)


def texts_of(record: Record) -> list[str]:
    prompt = record.prompt if isinstance(record.prompt, str) else "\n".join(m["content"] for m in record.prompt)
    return [text for text in (prompt, *(completion.text for completion in record.completions)) if text]


def _sft(run: Run, folder: Path, counts: Counter[str]) -> None:
    recipe = run.recipe
    source = recipe.data.sft or recipe.data.preferences
    assert source is not None and recipe.sft is not None
    records = [preferred_only(record) for record in read_records_of(source, run, counts)]
    tokenizer = load_run_tokenizer(run)
    groups = tokenize(run, records, tokenizer, counts)
    torch.manual_seed(recipe.seed)
    model = load_policy(recipe.model, tokenizer)
    train_sft(model, tokenizer, groups, seeded(recipe.sft, recipe), folder)
    record_training_speed(run, folder, model, groups, recipe.sft)


def preferred_only(record: Record) -> Record:
    """K = 1: the preferred completion of a pair, the first of the best of K by reward, the only one of an SFT row."""
    best, rewards = record.preferred, record.rewards
    if best is None and rewards is not None and len(rewards) > 1:
        best = rewards.index(max(rewards))
    return record if best is None else replace(record, completions=(record.completions[best],), preferred=None)


def _oracle(run: Run, folder: Path, counts: Counter[str]) -> None:
    recipe = run.recipe
    assert recipe.oracle is not None and recipe.data.labelled is not None
    tokenizer = (
        load_run_tokenizer(run)
        if recipe.oracle.model.source is None
        else load_tokenizer(recipe.oracle.model.source, trust_remote_code=recipe.oracle.model.trust_remote_code)
    )
    records = list(read_source(recipe.data.labelled, counts, tokenizer))
    labels = [labels_of(record) for record in records]
    groups = list(
        tokenize_records(
            records,
            tokenizer,
            max_prompt_tokens=recipe.oracle.max_tokens,
            max_completion_tokens=recipe.oracle.max_tokens,
            counts=counts,
        )
    )
    torch.manual_seed(recipe.seed)
    model = load_classifier(recipe.oracle.model, tokenizer)
    keep_limits(model, trained_limits(recipe, "oracle"))
    train_classifier(model, tokenizer, groups, labels, seeded(recipe.oracle, recipe), folder)
    record_training_speed(run, folder, model, groups, recipe.oracle)


def labels_of(record: Record) -> int:
    """The label of a text row; a row without one is an error."""
    if record.rewards is None:
        raise InputError(f"data.labelled: row {record.id} has no label (0 or 1).")
    return int(record.rewards[0])


def _given_preferences(run: Run, folder: Path, counts: Counter[str]) -> None:
    source = run.recipe.data.preferences
    assert source is not None
    records = [pair for record in read_records_of(source, run, counts) for pair in preferences_of(record, counts)]
    if not records:
        raise InputError(f"{source.source} prefers no completion to another.")
    write_records(folder / "records", records, Header(counts=dict(counts)))


def preferences_of(record: Record, counts: Counter[str]) -> Iterator[Record]:
    """The pair as it is; of K completions with rewards, disjoint pairs, ties dropped and counted."""
    if record.preferred is not None:
        yield record
    elif record.rewards is not None and len(record.completions) > 1:
        yield from pairs_from_rewards([record], counts)
    else:
        raise InputError(
            f"data.preferences: row {record.id} has no preference (prompt, chosen, rejected, or prompt, completions, "
            "rewards)."
        )


def _sampled_preferences(run: Run, folder: Path, counts: Counter[str]) -> None:
    """Two samples of π_sft per prompt, ordered by the scorer."""
    recipe = run.recipe
    assert recipe.preferences is not None
    settings = recipe.sample.model_copy(update={"num_completions": 2})
    drawn = folder / "samples"
    _sample(run, settings, drawn, "preferences", counts)
    counts.update(_score(run, recipe.preferences.scorer, drawn, folder / "scored"))
    pairs = list(pairs_from_rewards(iter_records(folder / "scored"), counts))
    if not pairs:
        raise InputError("preferences: every pair of samples is a tie; the scorer does not tell them apart.")
    write_records(folder / "records", pairs, replace(read_header(drawn), counts=dict(counts)))


def _reward(run: Run, folder: Path, counts: Counter[str]) -> None:
    recipe = run.recipe
    assert recipe.reward is not None
    settings = recipe.reward.model or supervised_settings(run)
    tokenizer = load_run_tokenizer(run) if recipe.reward.model is None else load_tokenizer(str(settings.source))
    groups = tokenize(run, read_records(run.path("preferences", "records")), tokenizer, counts)
    torch.manual_seed(recipe.seed)
    model = load_reward_model(settings, tokenizer)
    keep_limits(model, trained_limits(recipe, "reward"))
    train_reward_model(model, tokenizer, groups, seeded(recipe.reward, recipe), folder)
    record_training_speed(run, folder, model, groups, recipe.reward)


def _rollouts(run: Run, folder: Path, counts: Counter[str]) -> None:
    _sample(run, run.recipe.sample, folder / "records", "rollouts", counts)


def _sample(run: Run, settings: SampleSettings, folder: Path, purpose: str, counts: Counter[str]) -> None:
    """Samples of π_sft for all prompts, by the recipe's workers or by this process."""
    if run.recipe.cluster is not None:
        sample_by_workers(run, run.recipe.cluster, settings, folder=folder, purpose=purpose, counts=counts)
    else:
        counts.update(sample_supervised(run, prompts_of(run, counts), settings, folder=folder, purpose=purpose))


def _scored(run: Run, folder: Path, counts: Counter[str]) -> None:
    counts.update(_score(run, run.recipe.score.scorer, run.path("rollouts", "records"), folder / "records"))
    counts["completions"] = sum(len(record.completions) for record in iter_records(folder / "records"))


def _score(run: Run, settings: ScorerSettings, source: Path, target: Path) -> Counter[str]:
    """The records of `source` with their rewards, by the recipe's workers or by this process; what the scorer cut."""
    if run.recipe.cluster is not None:
        return score_by_workers(run, run.recipe.cluster, settings, source, target)
    scorer = load_scorer(settings, run)
    with RecordWriter(target, shard_size=SHARD) as writer:
        for shard in shards_of(source)[-(-writer.written // SHARD) :]:
            cut: Counter[str] = Counter()
            writer.write_shard(scored(scorer, list(iter_shard(shard)), cut), cut)
        writer.close(read_header(source).with_counts(writer.counts))
    return writer.counts


def _given_rewards(run: Run, folder: Path, counts: Counter[str]) -> None:
    source = run.recipe.data.rewards
    assert source is not None
    records = read_records_of(source, run, counts)
    for record in records:
        if record.rewards is None:
            raise InputError(f"{source.source}: row {record.id} has no rewards (prompt, completions, rewards).")
    write_records(folder / "records", records, Header(counts=dict(counts)))


def reference_name(settings: AlignSettings) -> str:
    """The stage whose log π_sft a method reads: by its target, and by the precision it trains in."""
    return f"reference/{settings.target}" + ("" if settings.precision == "fp32" else f"-{settings.precision}")


def _reference(
    run: Run, folder: Path, counts: Counter[str], *, source: str, precision: Literal["fp32", "bf16"]
) -> None:
    """Token ids and log π_sft of everything that is aligned on, by the code path that training uses."""
    tokenizer = load_run_tokenizer(run)
    records = read_records(run.path(source, "records"))
    groups = tokenize(run, records, tokenizer, counts)
    model = ready(load_supervised(run, tokenizer))
    settings = AlignSettings(precision=precision)
    groups = with_reference_logp(model, groups, settings, temperature=run.recipe.temperature)
    done = [with_reference(records[group.index], group) for group in groups]
    write_records(folder / "records", done, Header(temperature=run.recipe.temperature, counts=dict(counts)))
    counts["groups"] = len(done)


def with_reference(record: Record, group: Group) -> Record:
    """The record with the token ids that the model saw and log π_sft of each completion."""
    assert group.reference_logp is not None
    completions = tuple(
        replace(completion, token_ids=tuple(ids.tolist()), reference_logprob=float(value))
        for completion, ids, value in zip(record.completions, group.completion_ids, group.reference_logp, strict=True)
    )
    return replace(record, prompt_ids=tuple(group.prompt_ids.tolist()), completions=completions)


def _align(run: Run, folder: Path, counts: Counter[str], settings: AlignSettings) -> None:
    recipe = run.recipe
    tokenizer = load_run_tokenizer(run)
    records = read_records(run.path(reference_name(settings), "records"))
    corrected = settings.target == "reward" and recipe.data.rewards is None and is_truncated(recipe.sample)
    groups = [group_of(record, index, from_proposal=corrected) for index, record in enumerate(records)]
    torch.manual_seed(settings.seed)
    model = load_supervised(run, tokenizer, trainable=True)
    train_align(model, tokenizer, groups, settings, folder, temperature=recipe.temperature)
    record_training_speed(run, folder, model, groups, settings)
    counts["prompts"] = len(groups)
    counts["completions"] = sum(group.num_completions for group in groups)


def is_truncated(settings: SampleSettings) -> bool:
    """Whether completions were drawn from something else than π_sft at τ, which the objective then corrects for."""
    return settings.top_p is not None or settings.top_k is not None
