"""What stages are made of: the run's tokenizer, models, data, scorers and samples, each with what it takes to read it.

A stage is put together from `Takes`: the settings and folders that it needs for each thing it uses.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.batching import Group
from exalign.data.reading import Sources, each, holds_records, named, prompt_digest, read_source
from exalign.data.record import Record
from exalign.data.store import Header, RecordWriter, iter_records
from exalign.data.tokenization import TokenLimits, tokenize_records
from exalign.device import device
from exalign.errors import InputError
from exalign.evaluation.run_folder import trained_elsewhere
from exalign.models.loading import load_policy, load_tokenizer
from exalign.models.memory import release_memory
from exalign.models.model_settings import ModelSettings
from exalign.processes import collected, gathered, in_order, leads, processes, share_of
from exalign.redaction import redact
from exalign.rollout.rollout import Numerics, open_sampler, rollout, with_logprobs
from exalign.rollout.sampler import draws_rounded
from exalign.rollout.scorers import Scorer, open_scorer
from exalign.rollout.settings import SampleSettings, ScorerSettings
from exalign.rollout.vllm import close_engine, engine_of
from exalign.run.recipe import Recipe, holds_out
from exalign.run.view import Stage, View, sections_of
from exalign.storage import fingerprint
from exalign.terminal import LINE_SECONDS, shown, time_left
from exalign.training.train_settings import TrainSettings

MANY_CUT = 0.05
"""From this share on it is told while it happens that texts are cut."""
SHARD, SHARD_COMPLETIONS = 256, 4096
"""Prompts, or fewer of many completions, that are sampled and written together: a kill costs one shard."""

LIMITS = ("data.max_prompt_tokens", "data.max_completion_tokens")
SAMPLED = (
    "seed",
    "temperature",
    "sample.engine",
    "sample.vllm",
    "sample.precision",
    "sample.max_new_tokens",
    "sample.batch_completions",
    "data.max_prompt_tokens",
)
"""What every sample of a policy depends on, besides the policy."""


@dataclass(frozen=True)
class Takes:
    """Settings that are read and stages whose folders are, for one thing or several."""

    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def __add__(self, other: Takes) -> Takes:
        return Takes((*self.reads, *other.reads), (*self.needs, *other.needs))

    def stage(self, name: str, work: Callable[[View], None], **how: Any) -> Stage:
        """The stage that takes this; a setting is named once, a section without its parts."""
        reads = tuple(path for path in dict.fromkeys(self.reads) if not {*sections_of(path)} & {*self.reads})
        if how.get("trains"):
            work = room_to_train()(work)
        return Stage(name, reads, tuple(dict.fromkeys(self.needs)), work, **how)


@contextmanager
def room_to_train() -> Iterator[None]:
    """Around a training: an engine drawn with before holds no memory meanwhile, its model none after.

    What trains refers to itself in circles, which Python would leave until it happens to look for some.
    """
    close_engine()
    try:
        yield
    finally:
        release_memory()


def takes_tokenizer(recipe: Recipe) -> Takes:
    """The policy's tokenizer."""
    needs = () if recipe.tokenizer.vocab_size is None else ("tokenizer",)
    return Takes(("model.source", "model.trust_remote_code", "tokenizer"), needs)


def takes_supervised(recipe: Recipe) -> Takes:
    """π_sft, with its tokenizer."""
    return takes_tokenizer(recipe) + Takes(("model",), () if recipe.sft is None else ("sft",))


@dataclass(frozen=True)
class Scoring:
    """A scorer of a recipe: the place where its settings stand, None where it is this run's own stage without any."""

    place: str | None
    stages: tuple[str, ...]

    @property
    def takes(self) -> Takes:
        return Takes(() if self.place is None else (self.place,), self.stages)

    def load(self, view: View) -> Scorer:
        """The scorer, ready to score."""
        settings = attrgetter(self.place)(view.recipe) if self.place else ScorerSettings(stage=self.stages[0])
        return open_scorer(settings, lambda stage: str(view.path(stage, "model")))


def scoring(recipe: Recipe) -> Scoring | None:
    """What gives the rollouts their rewards."""
    return _named(recipe, recipe.scoring, "score.scorer")


def judging(recipe: Recipe) -> Scoring | None:
    """What judges the samples of the evaluation."""
    return _named(recipe, recipe.judging, "evaluate.scorer", "score.scorer")


def _named(recipe: Recipe, settings: ScorerSettings | None, *places: str) -> Scoring | None:
    here = (place for place in places if attrgetter(place)(recipe) is settings)
    return None if settings is None else Scoring(next(here, None), settings.stages)


def takes_data(recipe: Recipe, name: str) -> Takes:
    """A data source; where it cuts texts by tokens, or its rows may have token ids, the tokenizer with it."""
    source = getattr(recipe.data, name)
    if source is None:
        return Takes()
    here = Takes((f"data.{name}",))
    return here + takes_tokenizer(recipe) if told_in_tokens(source) else here


def are_cut(sources: Sources | None) -> bool:
    """Whether any texts are cut into prompt and completion, which takes a tokenizer."""
    return any(one.prompt_tokens is not None for one in each(sources or []))


def told_in_tokens(sources: Sources) -> bool:
    """Whether a source is cut by tokens, or was written by a run, with token ids."""
    return are_cut(sources) or any(holds_records(Path(one.source)) for one in each(sources))


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation mode, on the accelerator where there is one."""
    model.to(device())  # type: ignore[arg-type]
    return model.eval()


Trained = TypeVar("Trained", bound=TrainSettings)


def seeded(settings: Trained, recipe: Recipe) -> Trained:
    """A stage's settings with the recipe's seed added to its own."""
    return settings.model_copy(update={"seed": recipe.seed + settings.seed})


def run_tokenizer(view: View) -> PreTrainedTokenizerBase:
    """The policy's tokenizer: trained by this run, named by the recipe, or the one of the model."""
    model, settings = view.recipe.model, view.recipe.tokenizer
    trained = str(view.path("tokenizer")) if settings.vocab_size is not None else None
    source = trained or settings.source or model.source
    assert source is not None  # the recipe's own check
    return load_tokenizer(
        source, trust_remote_code=model.trust_remote_code, chat_template_kwargs=settings.chat_template_kwargs
    )


def supervised_settings(view: View) -> ModelSettings:
    """π_sft: what the sft stage made, else the model that the recipe starts from."""
    if not view.has("sft"):
        return view.recipe.model
    return view.recipe.model.model_copy(update={"source": str(view.path("sft", "model")), "config": None})


def supervised(view: View, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """π_sft in evaluation mode, on the device."""
    return ready(load_policy(supervised_settings(view).model_copy(update={"lora": None}), tokenizer))


def frozen_policy(view: View, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A policy that the run wrote, or that it says was trained elsewhere, in evaluation mode on the device."""
    source = trained_elsewhere(folder) or str(folder)
    settings = view.recipe.model.model_copy(update={"source": source, "config": None, "lora": None})
    return ready(load_policy(settings, tokenizer))


def own_tokenizer(view: View, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """That of a policy trained elsewhere whose tokens are not those of `tokenizer`; None where they are."""
    source = trained_elsewhere(folder)
    if source is None:
        return None
    own = load_tokenizer(source, trust_remote_code=view.recipe.model.trust_remote_code)
    return None if own.get_vocab() == tokenizer.get_vocab() else own


def token_limits(view: View) -> TokenLimits:
    """The recipe's, of texts that are trained on."""
    data = view.recipe.data
    return TokenLimits(max_prompt_tokens=data.max_prompt_tokens, max_completion_tokens=data.max_completion_tokens)


def tokenize(
    view: View, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, limits: TokenLimits | None = None
) -> list[Group]:
    """Token groups of the records, under the recipe's limits unless others are given; none at all is an error."""
    limits = limits or token_limits(view)
    before, groups = Counter(view.counts), list(tokenize_records(records, tokenizer, limits=limits, counts=view.counts))
    if not groups:
        raise InputError("No usable rows are left; `exalign inspect DATA --model M` shows what happens to each.")
    new, completions = view.counts - before, sum(group.num_completions for group in groups)
    _tell_cut(view, "prompt", new["prompts_cut"], len(groups), limits.max_prompt_tokens)
    _tell_cut(view, "completion", new["completions_cut"], completions, limits.max_completion_tokens)
    return groups


def _tell_cut(view: View, what: str, cut: int, number: int, limit: int) -> None:
    if cut and cut >= MANY_CUT * number:
        said = f"  ! {cut:,} of {number:,} {what}s are cut at {limit:,} tokens (data.max_{what}_tokens)"
        view.console.print(shown(said, "yellow"), soft_wrap=True)


def with_ids(view: View, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Record]:
    """The records that can be used, with the token ids that models see."""
    return [
        replace(records[group.index], prompt_ids=tuple(group.prompt_ids.tolist())).with_each(
            "token_ids", (tuple(ids.tolist()) for ids in group.completion_ids)
        )
        for group in tokenize(view, records, tokenizer)
    ]


def records_of(view: View, name: str, counts: Counter[str] | None = None) -> Iterator[Record]:
    """The records of a data source, split into prompt and completion and freed of others' ids by the run's tokenizer.

    None at all is an error when they are read to their end.
    """
    source, record = getattr(view.recipe.data, name), None
    tokenizer = run_tokenizer(view) if told_in_tokens(source) else None
    for record in read_source(source, view.counts if counts is None else counts, tokenizer):
        yield record
    if record is None:
        raise InputError(f"data.{name}: {named(source)} has no usable rows.")


def takes_prompts(recipe: Recipe) -> Takes:
    """The prompts to sample from; with those that are held out for the evidence, which are none of them."""
    if recipe.data.prompts is None:
        return Takes(needs=("preferences",))
    return takes_data(recipe, "prompts") + takes_held_out(recipe)


def takes_held_out(recipe: Recipe) -> Takes:
    """The prompts that are held out for the evidence, where any are."""
    return Takes(needs=("preferences",)) if holds_out(recipe) else Takes()


def not_held_out(view: View, records: Iterable[Record], counts: Counter[str]) -> Iterator[Record]:
    """The records less those whose prompt is held out for the evidence, which are counted."""
    folder = view.path("preferences", "held-out") if view.has("preferences") else None
    there = folder is not None and (folder / "header.json").is_file()
    kept = {prompt_digest(record) for record in iter_records(folder)} if folder is not None and there else set()
    for record in records:
        if kept and prompt_digest(record) in kept:
            counts["rows_held_out"] += 1
        else:
            yield record


def iter_prompts(view: View, counts: Counter[str]) -> Iterator[Record]:
    """The prompts to sample from, without their completions, as they are read; of preferences each prompt once."""
    if "data.prompts" in view.stage.reads:
        records = not_held_out(view, records_of(view, "prompts", counts), counts)
        cut_here = are_cut(view.recipe.data.prompts)
    else:
        records, cut_here = different_prompts(iter_records(view.path("preferences", "records"))), True
    for record in records:
        # Ids that a record of another run brought along may be of another template, or cut to another limit.
        yield replace(record, completions=(), preferred=None, prompt_ids=record.prompt_ids if cut_here else None)


def prompts_of(view: View) -> list[Record]:
    """All prompts to sample from."""
    return list(iter_prompts(view, view.counts))


def different_prompts(records: Iterable[Record]) -> Iterator[Record]:
    """The first record of every prompt."""
    seen: set[bytes] = set()
    for record in records:
        found = prompt_digest(record)
        if found not in seen:
            seen.add(found)
            yield record


def purpose_seed(view: View, purpose: str) -> int:
    """A seed for one use of the sampler, so that the same prompt gets other samples for another purpose."""
    return int(fingerprint([view.recipe.seed, purpose]), 16) >> 1


def offline_sampling(view: View, num_completions: int) -> SampleSettings:
    """How the samples that methods train on are drawn."""
    sample = view.recipe.sample
    whole = evaluation_sampling(view, num_completions)
    return whole.model_copy(update={"top_p": sample.top_p, "top_k": sample.top_k})


def evaluation_sampling(view: View, num_completions: int) -> SampleSettings:
    """Samples at the training τ from the whole distribution, whatever the rollouts are cut to."""
    sample = view.recipe.sample
    return SampleSettings(
        num_completions=num_completions,
        max_new_tokens=sample.max_new_tokens,
        max_prompt_tokens=view.recipe.data.max_prompt_tokens,
        batch_completions=sample.batch_completions,
        precision=sample.precision,
        engine=sample.engine,
        vllm=sample.vllm,
    )


def samples_header(view: View, settings: SampleSettings, purpose: str, temperature: float) -> Header:
    """Where samples of a policy of the run came from."""
    recipe = view.recipe
    source = recipe.model.source
    return Header(
        model=redact(source or "trained by this run"),
        tokenizer=redact(recipe.tokenizer.source or source or "trained by this run"),
        temperature=temperature,
        seed=recipe.seed,
        sampler=engine_of(settings.engine, device()),
        fingerprint=fingerprint([settings.deciding(), purpose, recipe.seed]),
    )


@dataclass(frozen=True)
class Wanted:
    """Which samples are wanted of a policy; `purpose` seeds them, so that each use gets others.

    At a `temperature` of their own, and not the training τ, they get no log π_sft, which is one at τ.
    """

    prompts: Sequence[Record]
    settings: SampleSettings
    purpose: str
    temperature: float | None = None


def draw(
    view: View,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    folder: Path,
    *,
    scorer: Scorer | None = None,
    reference: nn.Module | None = None,
) -> None:
    """Write samples of the policy to `folder`, continuing what stands there: scored, with log π_sft, as asked."""
    temperature = view.recipe.temperature if wanted.temperature is None else wanted.temperature
    seed = purpose_seed(view, wanted.purpose)
    sampler = open_sampler(policy, tokenizer, wanted.settings, temperature=temperature, seed=seed)
    # A KL is the policy's own, not that of the copy of it that draws.
    own = policy if reference is not None and draws_rounded(policy, wanted.settings) else None
    header = samples_header(view, wanted.settings, wanted.purpose, temperature)

    def drawn(part: Sequence[Record], counts: Counter[str]) -> list[Record]:
        return rollout(part, sampler, counts, Numerics(temperature), scorer=scorer, policy=own, reference=reference)

    before = Counter(view.counts)
    write_shared(view, folder, wanted.prompts, drawn, header, draws=wanted.settings.num_completions)
    new = view.counts - before
    if folder.parent in (view.folder, view.folder.parent):  # of the policies of a method it was told with the first
        _tell_cut(view, "prompt", new["prompts_cut"], new["prompts"], wanted.settings.max_prompt_tokens)


Work = Callable[[Sequence[Record], Counter[str]], list[Record]]
"""What makes records of as many others, and counts what there is to count."""


def read_by(numerics: Numerics, **models: nn.Module) -> Work:
    """What gives records whose tokens are known log π(y|x) under these models, as `logprob` or `reference_logprob`."""

    def read(records: Sequence[Record], _: Counter[str]) -> list[Record]:
        for name, model in models.items():
            records = with_logprobs(records, model, cast(Any, name), numerics)
        return list(records)

    return read


def write_shared(
    view: View, folder: Path, records: Sequence[Record] | Path, work: Work, header: Header, *, draws: int = 1
) -> None:
    """Write what `work` makes of the records, or of those of a folder, to `folder`, continuing what stands there.

    `draws` says how many completions it makes for each. Of several processes each takes a shard, or its share of one
    where fewer are left. The first one writes; the others go on when all is there.
    """
    writer = RecordWriter(folder, shard_size=SHARD) if leads() else None
    start = gathered(writer and writer.written)[0] or 0
    left = iter_records(records, start) if isinstance(records, Path) else iter(records[start:])
    total, done, begun = None if isinstance(records, Path) else len(records), start, time.monotonic()
    said = begun

    def worked(part: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
        counts: Counter[str] = Counter()
        return (work(part, counts) if part else []), counts

    while shards := [shard for _ in range(processes()) if (shard := _next_shard(left, draws))]:
        if len(shards) == processes():
            made = [one for own in collected([worked(shard) for shard in share_of(shards)]) for one in own]
        else:
            made = [_joined(collected(worked(share_of(shard)))) for shard in shards]
        if writer is not None:
            for rows, counts in made:
                writer.write_shard(rows, counts)
        done += sum(map(len, shards))
        if time.monotonic() - said >= LINE_SECONDS and done != total:
            said = time.monotonic()
            of = "" if total is None else f" of {total:,}{time_left(begun, done - start, total - start)}"
            view.console.print(shown(f"  {view.stage.name}: {done:,}{of} rows", "dim"), soft_wrap=True)
    if writer is not None:
        writer.close(header.with_counts(writer.counts))
        view.counts.update(writer.counts)
    gathered(None)


def _next_shard(left: Iterator[Record], draws: int) -> list[Record]:
    shard: list[Record] = []
    completions = 0
    while len(shard) < SHARD and completions < SHARD_COMPLETIONS and (record := next(left, None)) is not None:
        shard.append(record)
        completions += max(len(record.completions), draws)
    return shard


def _joined(shares: Sequence[tuple[list[Record], Counter[str]]]) -> tuple[list[Record], Counter[str]]:
    """A shard of which each process has a share, and what all counted."""
    return in_order([records for records, _ in shares]), sum((counts for _, counts in shares), Counter())


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """What a training wrote of each of its steps."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
