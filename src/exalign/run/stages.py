"""The stages of a recipe in order, and the work of those that prepare and align.

tokenizer → sft → oracle → preferences → reward → validation → rollouts → scored → reference/… → search/… → align/…
→ evaluation/… → report
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import group_of
from exalign.data.reading import each, read_source, stripped, whole
from exalign.data.record import Record, pairs_from_rewards
from exalign.data.store import Header, iter_records, read_header, read_records, write_records
from exalign.data.tokenization import TokenLimits, build_tokenizer
from exalign.errors import InputError
from exalign.evaluation.pool import beta_at
from exalign.evaluation.run_folder import DRAWN, pool_rewards, step_name
from exalign.evaluation.verdict import own_sample_warnings
from exalign.methods.method import Material, Method
from exalign.methods.oracle import train_classifier
from exalign.methods.reward_model import train_reward_model
from exalign.methods.sft import train_sft
from exalign.models.loading import load_classifier, load_policy, load_reward_model, load_tokenizer
from exalign.models.model_settings import ModelSettings
from exalign.processes import gathered, leads
from exalign.redaction import redact
from exalign.rollout.rollout import Numerics, with_logprobs
from exalign.rollout.scorers import keep_limits, scored
from exalign.rollout.settings import SampleSettings
from exalign.run.cluster import sample_by_workers, score_by_workers
from exalign.run.evaluating import PAIRS, POOL, PROXY, evaluation_stages, proxy, reads_pairs
from exalign.run.materials import (
    LIMITS,
    SAMPLED,
    Scoring,
    Takes,
    Wanted,
    draw,
    metric_rows,
    not_held_out,
    offline_sampling,
    prompts_of,
    read_by,
    records_of,
    run_tokenizer,
    scoring,
    seeded,
    supervised,
    supervised_settings,
    takes_data,
    takes_held_out,
    takes_prompts,
    takes_supervised,
    takes_tokenizer,
    token_limits,
    tokenize,
    with_ids,
    write_shared,
)
from exalign.run.recipe import Recipe, holds_out, holds_out_rewards, trained_on
from exalign.run.search import search_stage, searched_settings, validation_stage
from exalign.run.view import Stage, View
from exalign.storage import fingerprint, link_folder, write_json
from exalign.terminal import shown

SEED = Takes(("seed",))
OFFLINE = Takes((*SAMPLED, "sample.top_p", "sample.top_k"))
"""What the samples that methods train on depend on, besides the policy and their number."""


def plan(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe needs, each with what it reads."""
    evaluation = [*evaluation_stages(recipe)]
    methods = [*_methods(recipe)]
    # What a method needs of the evaluation, the pool that its β is chosen from and held-out pairs, comes before it.
    needed = {need for stage in methods for need in stage.needs}
    pools = {POOL, PROXY} & needed
    early = ({f"{DRAWN}pool", *pools} if pools else set()) | ({PAIRS} & needed)
    return [
        *_preparation(recipe),
        *validation_stage(recipe),
        *_samples(recipe),
        *(stage for stage in evaluation if stage.name in early),
        *methods,
        *(stage for stage in evaluation if stage.name not in early),
    ]


def _preparation(recipe: Recipe) -> Iterator[Stage]:
    data, tokenizer, policy = recipe.data, takes_tokenizer(recipe), takes_supervised(recipe)
    limited = SEED + Takes(LIMITS)
    if recipe.tokenizer.vocab_size is not None:
        yield Takes(("tokenizer.vocab_size", "data.sft")).stage("tokenizer", _tokenizer)
    held_out = Takes(("data.held_out", "evaluate.pairs")) if holds_out(recipe) else Takes()
    if data.preferences is not None:
        yield (takes_data(recipe, "preferences") + held_out).stage("preferences", _given_preferences)
    if recipe.sft is not None:
        name = "sft" if data.sft is not None else "preferences"
        source = takes_data(recipe, name) + takes_held_out(recipe)
        takes = limited + tokenizer + source + Takes(("model", "sft"))
        yield takes.stage("sft", partial(_sft, source=name), trains=True)
    if recipe.oracle is not None:
        own = tokenizer if recipe.oracle.model.source is None else Takes()
        takes = SEED + own + Takes(("oracle", "data.labelled"))
        yield takes.stage("oracle", _oracle, trains=True)
    if recipe.preferences is not None:
        scorer = Scoring("preferences.scorer", recipe.preferences.scorer.stages)
        takes = policy + OFFLINE + _pool(recipe) + takes_data(recipe, "prompts") + scorer.takes
        yield takes.stage("preferences", partial(_sampled_preferences, scorer=scorer), shared=recipe.cluster is None)
    if recipe.reward is not None:
        scratch = recipe.reward.model is not None and recipe.reward.model.source is None
        started = policy if recipe.reward.model is None else tokenizer if scratch else Takes()
        takes = limited + started + Takes(("reward",), ("preferences",))
        yield takes.stage("reward", _reward, trains=True)


def _pool(recipe: Recipe) -> Takes:
    """The workers that sample and score, where there are any."""
    return Takes() if recipe.cluster is None else Takes(("cluster",))


def _samples(recipe: Recipe) -> Iterator[Stage]:
    """Samples and their rewards for the methods that train on them, and log π_sft of whatever methods train on."""
    policy, wanted = takes_supervised(recipe), trained_on(recipe)
    if "rewards" in wanted and recipe.data.rewards is not None:
        yield (takes_data(recipe, "rewards") + takes_held_out(recipe)).stage("scored", _given_rewards)
    elif "rewards" in wanted:
        drawn = policy + OFFLINE + Takes(("sample.num_completions",)) + _pool(recipe) + takes_prompts(recipe)
        yield drawn.stage("rollouts", _rollouts, shared=recipe.cluster is None)
        scorer = scoring(recipe)
        assert scorer is not None
        takes = scorer.takes + _pool(recipe) + Takes(needs=("rollouts",))
        yield takes.stage("scored", partial(_scored, scorer=scorer), shared=recipe.cluster is None)
    done: set[str] = set()
    for method in recipe.align.values():
        name = reference_of(method)
        if name is not None and name not in done:
            done.add(name)
            source = "preferences" if method.trains_on == "preferences" else "scored"
            takes = policy + Takes(("temperature", *LIMITS), (source,))
            yield takes.stage(name, partial(_reference, source=source, precision=method.precision), shared=True)


def reference_of(method: Method) -> str | None:
    """The stage whose log π_sft a method reads: by what it trains on, and by the precision it trains in."""
    kind = {"preferences": "preference", "rewards": "reward"}.get(method.trains_on)
    precision = "" if method.precision == "fp32" else f"-{method.precision}"
    return None if kind is None else f"reference/{kind}{precision}"


def _methods(recipe: Recipe) -> Iterator[Stage]:
    """A stage align/NAME for every method, after search/NAME where the recipe searches for its settings."""
    for name, method in recipe.align.items():
        if method.trains_on == "nothing":
            yield Takes((f"align.{name}",)).stage(f"align/{name}", partial(_given, name=name))
            continue
        takes = takes_supervised(recipe) + SEED + Takes(("temperature", f"align.{name}"))
        scorer, critic = scoring(recipe), False
        if (reference := reference_of(method)) is not None:
            takes += Takes(needs=(reference,))
            if method.trains_on == "preferences" and reads_pairs(recipe):
                takes += Takes(needs=(PAIRS,))
            if method.trains_on == "rewards" and recipe.data.rewards is None:
                takes += Takes(("sample.top_p", "sample.top_k"))
            if holds_out_rewards(method):
                takes += Takes(("data.held_out",))
        else:
            assert scorer is not None
            takes += OFFLINE + scorer.takes + takes_prompts(recipe)
            if method.num_completions is None:
                takes += Takes(("sample.num_completions",))
            critic = method.wants_critic and recipe.reward is not None and recipe.reward.model is None
            if critic:
                takes += Takes(needs=("reward",))
        if method.swept is not None and method.swept[0] == "kl":
            takes += Takes(needs=(POOL if proxy(recipe) is None else PROXY,))
        material = partial(_material, name=name, scorer=scorer, critic=critic)
        if recipe.search is not None and name in recipe.search.methods:
            yield search_stage(recipe, name, takes, material)
            takes += Takes(needs=(f"search/{name}",))
        yield takes.stage(f"align/{name}", partial(_align, name=name, material=material), trains=True)


def _given(view: View, *, name: str) -> None:
    """Say where the policies are that were trained elsewhere, as if each had been saved after one step more."""
    method = view.recipe.align[name]
    write_json(view.folder / "method.json", method.described())
    places = [view.folder / "policies" / step_name(step) for step, _ in enumerate(method.given, start=1)]
    for place, source in zip([*places, view.folder / "model"], [*method.given, method.given[-1]], strict=True):
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "source.json", {"source": source})


def _material(view: View, *, name: str, scorer: Scoring | None, critic: bool) -> Material:
    """What a method trains with: new at every call, as training changes it. `critic`: from this run's reward model."""
    recipe, tokenizer, started = view.recipe, run_tokenizer(view), supervised_settings(view)
    method = recipe.align[name]
    material = Material(load_policy(started, tokenizer), tokenizer, recipe.temperature, counts=view.counts)
    if (reference := reference_of(method)) is not None:
        records, kept = read_records(view.path(reference, "records")), list[Record]()
        if method.num_completions is not None:
            records = [replace(record, completions=record.completions[: method.num_completions]) for record in records]
        if "data.held_out" in view.stage.reads:
            records, kept = hold_out(records, recipe.data.held_out, len(records), "align")
            view.counts["prompts_held_out"] = len(kept)
        # Cut draws come from something else than π_sft at τ, which the objective then corrects for.
        sampled = "sample.top_p" in view.stage.reads
        corrected = sampled and (recipe.sample.top_p is not None or recipe.sample.top_k is not None)
        groups = [group_of(record, index, from_proposal=corrected) for index, record in enumerate(records)]
        view.counts["prompts"] = len(groups)
        view.counts["completions"] = sum(group.num_completions for group in groups)
        if not kept and view.has(PAIRS):
            kept = read_records(view.path(PAIRS, "records"))
            if method.precision != "fp32":  # what was read in float32 says nothing of a log-ratio in bfloat16
                numerics = Numerics(recipe.temperature, "auto", method.precision)
                kept = with_logprobs(kept, supervised(view, tokenizer), "reference_logprob", numerics)
        held_out = [group_of(record, index, from_proposal=corrected) for index, record in enumerate(kept)]
        return replace(material, groups=groups, held_out=held_out)
    assert scorer is not None
    return replace(
        material,
        prompts=prompts_of(view),
        sampling=offline_sampling(view, method.num_completions or recipe.sample.num_completions),
        scorer=scorer.load(view),
        reference=supervised(view, tokenizer),
        critic=ModelSettings(source=str(view.path("reward", "model")), dtype=started.dtype) if critic else started,
    )


def _align(view: View, *, name: str, material: partial[Material]) -> None:
    """Train a method with its settings, or with those of its search's best trial, whose weights it takes over.

    A sweep is one training for each value, in `at-1`, `at-2`, … of the method's folder. Their last policies get second
    names as `policies/step-000001`, …, where everything that reads a method's policies finds them: the ends of the
    trainings are the points of its frontier, as optima are a family over β.
    """
    method = view.recipe.align[name]
    if view.has(f"search/{name}"):
        method = searched_settings(view, name, method)
    members, settled = [(method, view.folder)], list[Method]()
    if method.swept is not None:
        swept = enumerate(_swept(view, method), start=1)
        members = [(one, view.folder / f"at-{number}") for number, one in swept]
    for number, (one, place) in enumerate(members, start=1):
        if len(members) > 1:
            view.console.print(shown(f"  {number} of {len(members)}: {one.line}", "dim"), soft_wrap=True)
        settings = seeded(one, view.recipe)
        torch.manual_seed(settings.seed)
        given = material(view if number == 1 else replace(view, counts=Counter()))
        settled.append(one.settled(given.groups))
        if leads():
            now = settled[-1].described() if method.swept is None else method.described()
            write_json(view.folder / "method.json", now)
        settings.train(given, place)
        if leads():
            rows = metric_rows(place)
            metrics = {metric: [row.get(metric) for row in rows] for metric in rows[0]}
            for sentence in own_sample_warnings(place.relative_to(view.folder.parent).as_posix(), metrics):
                view.console.print(shown(f"  ! {sentence}", "yellow"), soft_wrap=True)
    if method.swept is not None:
        if leads():
            for number, (_, place) in enumerate(members, start=1):
                link_folder(place / "model", view.folder / "policies" / step_name(number))
            link_folder(members[-1][1] / "model", view.folder / "model")
            write_json(view.folder / "method.json", _sweep_described(method, settled))
        gathered(None)


def _swept(view: View, method: Method) -> list[Method]:
    """The methods that a sweep consists of; for `kl` with the β at which the optimum lies at so many nats."""
    assert method.swept is not None
    setting, values = method.swept
    if setting != "kl":
        return [method.at(setting, value) for value in values]
    rewards = pool_rewards(view.path(PROXY if view.has(PROXY) else POOL))
    return [method.at_beta(beta_at(rewards, kl)) for kl in values]


def _sweep_described(method: Method, members: Sequence[Method]) -> dict[str, Any]:
    """What a report knows of a sweep: its last policy's method, and of each policy its value and the β aimed at."""
    assert method.swept is not None
    setting, values = method.swept
    points = [{"value": value, "beta": one.optimum_beta} for value, one in zip(values, members, strict=True)]
    what = "the β of an optimum" if setting == "kl" else setting
    listed = ", ".join(f"{value:g}" for value in values) + (" nats" if setting == "kl" else "")
    line = f"{method.label}, a policy trained for {what} at each of {listed}"
    own = {"line": line, "settings": method.model_dump(mode="json")}
    return members[-1].described() | own | {"sweep": {"setting": setting, "points": points}}


def _tokenizer(view: View) -> None:
    settings = view.recipe.tokenizer
    assert settings.vocab_size is not None
    assert view.recipe.data.sft is not None
    records = read_source([whole(one) for one in each(view.recipe.data.sft)], view.counts)
    texts = (text for record in records for text in texts_of(record))
    tokenizer = build_tokenizer(texts, vocab_size=settings.vocab_size)
    tokenizer.save_pretrained(view.folder)
    view.counts["tokens_in_vocabulary"] = len(tokenizer)


def texts_of(record: Record) -> list[str]:
    prompt = record.prompt if isinstance(record.prompt, str) else "\n".join(m["content"] for m in record.prompt)
    return [text for text in (prompt, *(completion.text for completion in record.completions)) if text]


def _sft(view: View, *, source: str) -> None:
    recipe, records = view.recipe, not_held_out(view, records_of(view, source), view.counts)
    tokenizer, best = run_tokenizer(view), []
    for record in records:
        if not record.completions:
            view.counts["rows_without_a_completion"] += 1
        elif record.preferred is None and len(record.completions) > 1 and len({*(record.rewards or ())}) == 1:
            view.counts["ties"] += 1  # none of them is better than another
        else:
            best.append(preferred_only(record))
    groups = tokenize(view, best, tokenizer)
    torch.manual_seed(recipe.seed)
    model = load_policy(recipe.model.saved_whole(), tokenizer)  # an adapter of the alignment names it as its base
    assert recipe.sft is not None
    train_sft(model, tokenizer, groups, seeded(recipe.sft, recipe), view.folder)


def preferred_only(record: Record) -> Record:
    """K = 1: the preferred completion of a pair, the first of the best of K by reward, the only one of an SFT row."""
    best, rewards = record.preferred, record.rewards
    if best is None and rewards is not None and len(rewards) > 1:
        best = rewards.index(max(rewards))
    return record if best is None else replace(record, completions=(record.completions[best],), preferred=None)


def _oracle(view: View) -> None:
    recipe, settings = view.recipe, view.recipe.oracle
    assert settings is not None
    tokenizer = _tokenizer_of(view, settings.model)
    limits = TokenLimits(max_prompt_tokens=settings.max_tokens, max_completion_tokens=settings.max_tokens)
    assert recipe.data.labelled is not None
    records = list(read_source(recipe.data.labelled, view.counts, tokenizer))
    for record in records:
        if record.rewards not in ([0.0], [1.0]):
            raise InputError(f"data.labelled: row {record.id} has no label (0 or 1).")
    labels = [int(record.rewards[0]) for record in records if record.rewards is not None]
    groups = tokenize(view, records, tokenizer, limits)
    torch.manual_seed(recipe.seed)
    model = load_classifier(settings.model, tokenizer)
    keep_limits(model, limits)
    train_classifier(model, tokenizer, groups, labels, seeded(settings, recipe), view.folder)


def _tokenizer_of(view: View, own: ModelSettings | None) -> PreTrainedTokenizerBase:
    """The tokenizer that a scalar model starts with: its own, or the policy's."""
    if own is None or own.source is None:
        return run_tokenizer(view)
    return load_tokenizer(own.source, trust_remote_code=own.trust_remote_code)


def _given_preferences(view: View) -> None:
    pairs = [pair for record in records_of(view, "preferences") for pair in preferences_of(record, view.counts)]
    if not pairs:
        raise InputError("data.preferences: no row prefers a completion to another.")
    if "data.held_out" in view.stage.reads:
        pairs, kept = hold_out(pairs, view.recipe.data.held_out, view.recipe.evaluate.pairs, "data.preferences")
        view.counts["held_out_pairs"] = len(kept)
        write_records(view.folder / "held-out", kept, Header(counts={"held_out_pairs": len(kept)}))
        view.console.print(
            shown(
                f"  {len(kept):,} of {len(kept) + len(pairs):,} pairs are held out for the evidence and never trained "
                "on (data.held_out; data.evaluation names other ones)",
                "dim",
            ),
            soft_wrap=True,
        )
    write_records(view.folder / "records", pairs, Header(counts=dict(view.counts)))


def hold_out(rows: Sequence[Record], share: float, most: int, where: str) -> tuple[list[Record], list[Record]]:
    """The rows less those of a share of the prompts, and these: the prompts whose content has the least hashes.

    So a prompt that is held out stays so when rows are added, moved or shuffled; no prompt is on both sides, and none
    of the sides is empty.
    """
    prints = [fingerprint(["held out", stripped(row.prompt)]) for row in rows]
    different = sorted(set(prints))
    if len(different) < 2:
        raise InputError(f"{where} has one prompt, so none can be held out; give more.")
    kept = set(different[: min(max(round(share * len(different)), 1), most, len(different) - 1)])
    sides: tuple[list[Record], list[Record]] = [], []
    for row, found in zip(rows, prints, strict=True):
        sides[found in kept].append(row)
    return sides


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


def _sampled_preferences(view: View, *, scorer: Scoring) -> None:
    """Two samples of π_sft per prompt, ordered by the scorer."""
    settings = offline_sampling(view, 2)
    drawn = view.folder / "samples"
    _sample(view, settings, drawn, "preferences")
    _score(view, scorer, drawn, view.folder / "scored")
    if not leads():
        return
    pairs = list(pairs_from_rewards(iter_records(view.folder / "scored"), view.counts))
    if not pairs:
        raise InputError("preferences: every pair of samples is a tie; the scorer does not tell them apart.")
    write_records(view.folder / "records", pairs, replace(read_header(drawn), counts=dict(view.counts)))


def _reward(view: View) -> None:
    recipe, settings = view.recipe, view.recipe.reward
    assert settings is not None
    tokenizer, pairs = _tokenizer_of(view, settings.model), view.path("preferences", "records")
    records, own = read_records(pairs), None if settings.model is None else settings.model.source
    if own is not None and redact(own) != read_header(pairs).tokenizer:
        records = [record.as_texts() for record in records]  # samples of the policy have the ids of its tokenizer
    groups = tokenize(view, records, tokenizer)
    torch.manual_seed(recipe.seed)
    model = load_reward_model(settings.model or supervised_settings(view), tokenizer)
    keep_limits(model, token_limits(view))
    train_reward_model(model, tokenizer, groups, seeded(settings, recipe), view.folder)


def _rollouts(view: View) -> None:
    settings = offline_sampling(view, view.recipe.sample.num_completions)
    _sample(view, settings, view.folder / "records", "rollouts")


def _sample(view: View, settings: SampleSettings, folder: Path, purpose: str) -> None:
    """Samples of π_sft for all prompts, by the recipe's workers or here."""
    if "cluster" in view.stage.reads:
        sample_by_workers(view, settings, folder=folder, purpose=purpose)
        return
    tokenizer = run_tokenizer(view)
    draw(view, supervised(view, tokenizer), tokenizer, Wanted(prompts_of(view), settings, purpose), folder)


def _scored(view: View, *, scorer: Scoring) -> None:
    _score(view, scorer, view.path("rollouts", "records"), view.folder / "records")
    if leads():
        view.counts["completions"] = sum(len(record.completions) for record in iter_records(view.folder / "records"))


def _score(view: View, scorer: Scoring, source: Path, target: Path) -> None:
    """Write the records of `source` with their rewards, by the recipe's workers or here, and count what was cut."""
    if "cluster" in view.stage.reads:
        view.counts.update(score_by_workers(view, scorer, source, target))
    else:
        write_shared(view, target, source, partial(scored, scorer.load(view)), read_header(source))


def _given_rewards(view: View) -> None:
    records = list(not_held_out(view, records_of(view, "rewards"), view.counts))
    for record in records:
        if record.rewards is None:
            raise InputError(f"data.rewards: row {record.id} has no rewards (prompt, completions, rewards).")
    write_records(view.folder / "records", records, Header(counts=dict(view.counts)))


def _reference(view: View, *, source: str, precision: Literal["fp32", "bf16"]) -> None:
    """Token ids and log π_sft of everything that is aligned on, by the code path that training uses."""
    tokenizer, temperature = run_tokenizer(view), view.recipe.temperature
    known = with_ids(view, read_records(view.path(source, "records")), tokenizer)
    header = Header(temperature=temperature, counts=dict(view.counts))
    read = read_by(Numerics(temperature, "auto", precision), reference_logprob=supervised(view, tokenizer))
    write_shared(view, view.folder / "records", known, read, header)
    view.counts["groups"] = len(known)
