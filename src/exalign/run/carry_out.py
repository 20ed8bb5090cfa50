"""A recipe carried out: what can be found out before any long work, then its stages.

By one process, or by the first of several, which the others join where all work.
"""

from __future__ import annotations

import os.path
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as voice

from exalign.data.reading import (
    DataSettings,
    Sources,
    each,
    looks_local,
    named,
    prompt_digest,
    read_source,
    whole,
)
from exalign.data.record import Record
from exalign.data.tokenization import UnfitError, build_tokenizer, with_token_ids
from exalign.device import device
from exalign.errors import InputError
from exalign.models.capability import check_positions
from exalign.models.loading import (
    check_base,
    check_quantised,
    check_trainable,
    check_weights,
    load_tokenizer,
    policy_skeleton,
    read_config,
)
from exalign.models.memory import room_for
from exalign.models.model_settings import ModelSettings
from exalign.processes import calls, leading, leads, several
from exalign.rollout import vllm
from exalign.rollout.scorers import check_scorer
from exalign.run import cluster
from exalign.run.evaluating import in_order
from exalign.run.materials import are_cut, told_in_tokens
from exalign.run.recipe import Recipe, changed, holds_out, models_of
from exalign.run.runner import Run, pin_to_run, recorded
from exalign.run.search import propose, validation_prompts
from exalign.run.stages import hold_out, plan, preferences_of, texts_of
from exalign.storage import exists
from exalign.terminal import shown
from exalign.training.train_settings import TrainSettings


def run_recipe(
    recipe: Recipe, *targets: str, folder: str | Path | None = None, redo: bool = False, recover: bool = False
) -> Run:
    """Carry out a recipe in `folder` (default `runs/NAME`) up to the stages named; see `Run` and `Run.carry_out`."""
    run = Run(recipe, folder, redo=redo, recover=recover)  # type: ignore[arg-type]
    carry_out(run, *targets)
    return run


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar for every file that it reads, nothing that it says below an error; afterwards as the caller had it."""
    level, bars = voice.get_verbosity(), voice.is_progress_bar_enabled()
    voice.set_verbosity_error()
    voice.disable_progress_bar()
    try:
        yield
    finally:
        voice.set_verbosity(level)
        if bars:
            voice.enable_progress_bar()


@_quiet_transformers()
def carry_out(run: Run, *targets: str) -> None:
    """Check everything that the recipe names, then carry out the stages.

    Of several processes the first one does so, and calls the others to the stages that train, or that they share.
    """
    stages = {stage.name: stage for stage in plan(run.recipe)}
    try:
        if not leads():
            for name in calls():
                pin_to_run(run.folder)
                vllm.keep_engine(recorded(run.folder).get("engine"))
                with room_for(name):
                    stages[name].work(run.view(stages[name]))
            return
        with leading():
            if run.redo or not all(run.path(name, "done.json").exists() for name in stages):
                for sentence in (*check_inputs(run.recipe), *check_room(run), *check_devices(run.recipe)):
                    run.console.print(shown(f"! {sentence}", "yellow"), soft_wrap=True)
            run.carry_out([*stages.values()], targets)
    finally:
        vllm.close_engine()


def check_inputs(recipe: Recipe) -> list[str]:
    """Raise the `InputError` that a stage would raise hours later: bad rows, missing files, models and functions.

    Local data is read to its end, row by row; hub data is left to the stage that downloads it. Returned is what should
    be said before the work.
    """
    looked = {name: _look(name, sources) for name, sources in _local_sources(recipe).items()}
    making = None if recipe.preferences is None else recipe.preferences.scorer
    drawn = ["preferences" if recipe.data.prompts is None else "prompts"]
    judged = ["preferences" if holds_out(recipe) else "evaluation", "validation"]
    own = [*drawn, *(judged if recipe.judging == recipe.score.scorer else ())]
    for scorer, names in ((making, drawn), (recipe.evaluate.scorer, judged), (recipe.score.scorer, own)):
        if scorer is not None:
            scored = [looked[name] for name in names if name in looked]
            check_scorer(scorer, [record for found in scored for record in found.patterns.values()])
    tokenizer = _tokenizer(recipe, looked)
    said = [f"align.{name}: {method.warning}." for name, method in recipe.align.items() if method.warning is not None]
    said += [*_check_models(recipe, tokenizer), *_check_templates(recipe, looked, tokenizer)]
    _check_methods(recipe, looked)
    _check_evaluation(recipe, looked)
    _check_search(recipe, looked)
    if recipe.cluster is not None:
        cluster.check_installed(recipe.cluster)
    if recipe.sample.engine == "vllm":
        vllm.check_installed()
    asked = looked.get("evaluation", _Looked()).prompts
    for name in ("preferences", "prompts", "rewards"):
        if shared := len(looked.get(name, _Looked()).prompts & asked):
            said.append(
                f"{shared:,} of the {len(asked):,} prompts of data.evaluation are in data.{name} too, and may be "
                "trained on."
            )
    return said


def check_room(run: Run) -> Iterator[str]:
    """A sentence where the disk has no room for what trainings that are to come will keep, as far as weights are known.

    They keep the policies that are saved and, where all weights are trained, a checkpoint with the optimizer's moments.
    """
    recipe = run.recipe
    methods = {f"align/{name}": method for name, method in recipe.align.items() if not method.given}
    sections: dict[str, TrainSettings | None] = {"sft": recipe.sft, "reward": recipe.reward, **methods}
    left = {n: s for n, s in sections.items() if s is not None and not run.path(n, "done.json").exists()}
    if recipe.model.source is None or not left:
        return
    parameters = sum(parameter.numel() for parameter in policy_skeleton(recipe.model).parameters())
    weights = parameters * getattr(torch, recipe.model.dtype).itemsize
    state = 0 if recipe.model.lora else 12 * parameters
    needed = 0
    for name, settings in left.items():
        method = methods.get(name)
        ends = 1 if method is None or method.swept is None else len(method.swept[1])
        saved = 1 if ends > 1 and method is not None and method.stop_after is None else settings.save_policies
        needed += ends * (state + (0 if method is not None and recipe.model.saves_adapter else saved * weights))
    there = next(folder for folder in (run.folder.absolute(), *run.folder.absolute().parents) if exists(folder))
    if needed > (free := shutil.disk_usage(there).free):
        yield (
            f"{run.folder}: {', '.join(left)} will keep up to {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are "
            "free there: save fewer policies (save_policies) or adapters alone (model.lora.save: adapter), or choose "
            "another place with --run DIR."
        )


def check_devices(recipe: Recipe) -> Iterator[str]:
    """A sentence where this process uses one of several GPUs; where each of several wants more than its own, an
    `InputError`.
    """
    divided, number = recipe.sample.vllm.gpus > 1, 1 if device().type == "cpu" else torch.accelerator.device_count()
    if divided and several() and vllm.engine_of(recipe.sample.engine, device()) == "vllm":
        raise InputError("sample.vllm.gpus: each process has an engine on its own GPU; set 1, or start one process.")
    if number > 1 and not several() and not divided and recipe.cluster is None:
        yield (
            f"One of {number} GPUs is used; the same arguments after `accelerate launch --multi_gpu --num_processes "
            f"{number} -m exalign` use all."
        )


@dataclass
class _Looked:
    """A local data source: the first record of every pattern of roles, its prompts, its completions at the least, how
    many preferences, and the columns that nothing was made of."""

    patterns: dict[Any, Record] = field(default_factory=dict)
    prompts: set[bytes] = field(default_factory=set)
    fewest: int | None = None
    preferences: int = 0
    columns: set[str] = field(default_factory=set)


def _look(name: str, sources: Sources) -> _Looked:
    found = _Looked()
    for settings in each(sources):
        for record in read_source(whole(settings), Counter()):
            _check_record(f"data.{name}", settings, record)
            said = record.prompt
            roles = "text" if isinstance(said, str) else tuple((m["role"], "tool_calls" in m) for m in said)
            found.patterns.setdefault((roles, bool(record.tools), bool(record.completions)), record)
            found.prompts.add(prompt_digest(record))
            number = 2 if record.preferred is None else len(record.completions)  # of rewards pairs are made
            found.fewest = min(number, found.fewest or number)
            found.preferences += record.preferred is not None
            found.columns |= (record.columns or {}).keys()
    if name == "sft" and found.patterns and not any(answered for *_, answered in found.patterns):
        raise InputError(f"data.sft: no row of {named(sources)} has a completion.")
    return found


def _tokenizer(recipe: Recipe, looked: Mapping[str, _Looked]) -> PreTrainedTokenizerBase | None:
    """The policy's tokenizer; one that the run trains, from the few rows that are at hand."""
    settings, model = recipe.tokenizer, recipe.model
    if settings.vocab_size is None:
        source, kwargs = settings.source or model.source, settings.chat_template_kwargs
        return load_tokenizer(str(source), trust_remote_code=model.trust_remote_code, chat_template_kwargs=kwargs)
    if "sft" not in looked:
        return None
    texts = (text for record in looked["sft"].patterns.values() for text in texts_of(record))
    return build_tokenizer(texts, vocab_size=settings.vocab_size)


def _check_models(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Every model that training starts from: its folder, weights, kind and positions."""
    data, trains = recipe.data, any((recipe.sft, recipe.reward, [m for m in recipe.align.values() if not m.given]))
    given = any((data.sft, data.preferences, data.rewards))
    texts = (data.max_prompt_tokens + data.max_completion_tokens, "data.max_prompt_tokens + data.max_completion_tokens")
    drawn = (data.max_prompt_tokens + recipe.sample.max_new_tokens, "data.max_prompt_tokens + sample.max_new_tokens")
    for where, model in models_of(recipe).items():
        check_model(model)
        head = where != "model" or bool(recipe.reward and recipe.reward.model is None)
        if where == "model" and recipe.sft is None:
            check_base(model)
        if where != "model" or trains:
            check_trainable(model, where, head=head)
        if model.config is not None and tokenizer is None:
            continue
        if model.config is None and (where != "model" or trains):
            saved = model.saved_whole() if head or recipe.sft else model
            check_quantised(read_config(model, tokenizer), saved, where)
        config = policy_skeleton(model, tokenizer).config if where == "model" else read_config(model, tokenizer)
        sums = [texts] if given and (where == "reward.model" or (where == "model" and trains)) else []
        if where == "oracle.model" and recipe.oracle is not None:
            sums = [(1 + recipe.oracle.max_tokens, "1 + oracle.max_tokens")]
        for longest, names in sums:
            if (sentence := check_positions(config, longest, settings=names, samples=False)) is not None:
                yield sentence
        if where == "model" and (recipe.align or recipe.preferences is not None):
            check_positions(config, drawn[0], settings=drawn[1], samples=True)
    for source in (source for method in recipe.align.values() for source in method.given):
        model = recipe.model.model_copy(update={"source": source, "config": None})
        check_model(model)
        check_positions(read_config(model, tokenizer), drawn[0], settings=drawn[1], samples=True)


def _check_templates(
    recipe: Recipe, looked: Mapping[str, _Looked], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """A row of every pattern of roles through every template that will write it."""
    other = {
        where: load_tokenizer(model.source, trust_remote_code=model.trust_remote_code)
        for where, model in models_of(recipe).items()
        if where in ("oracle.model", "reward.model") and model.source is not None
    }
    if tokenizer is not None and tokenizer.chat_template:
        yield from _untemplated(recipe, looked)
    for name, found in looked.items():
        used = [other.get("oracle.model", tokenizer)] if name == "labelled" else [tokenizer]
        used += [other["reward.model"]] if name == "preferences" and "reward.model" in other else []
        for writer in used:
            if writer is not None:
                yield from _unfit(f"data.{name}", list(found.patterns.values()), writer)


def _untemplated(recipe: Recipe, looked: Mapping[str, _Looked]) -> Iterator[str]:
    """A sentence about prompts that are text, for a model of chats, where nobody, and no other run, said so."""
    named = []
    for name, found in looked.items():
        sources = each(getattr(recipe.data, name))
        told = any("chat" in one.model_fields_set or told_in_tokens(one) for one in sources)
        texts = [one for one in found.patterns.values() if isinstance(one.prompt, str) and one.prompt.strip()]
        named += [f"data.{name}"] if texts and not told else []
    if named:
        yield (
            f"{', '.join(named)}: prompts are text, and the model's chat template is not applied to them. chat: true "
            "makes each a message of the user; chat: false says that text is meant."
        )


def _unfit(where: str, records: list[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A sentence for every record that no template writes, whatever it says; an `InputError` where that is all."""
    refused = []
    for record in records:
        try:
            with_token_ids(record, tokenizer, Counter())
        except UnfitError as error:
            if error.reason.startswith(("records_", "prompts_")):  # of its roles, not of its texts
                refused.append(error)
    if refused and len(refused) == len(records):
        raise InputError(f"{where}: no row can be used. {refused[0]}")
    yield from (f"{where}: {error} Rows like it are left out and counted." for error in refused)


def _check_methods(recipe: Recipe, looked: Mapping[str, _Looked]) -> None:
    """Methods, and the ends of what is searched over, against the number of completions that are compared."""
    given, held_out = looked.get("preferences"), looked.get("evaluation")
    for name, method in recipe.align.items():
        ranges = recipe.search.methods.get(name, {}) if recipe.search is not None else {}
        tried = [changed(method, {setting: value}) for setting, v in ranges.items() for value in v.extremes]
        for one in [method, *tried]:
            if one.trains_on != "rewards" and (problem := one.problem_with((given and given.fewest) or 2)):
                raise InputError(f"align.{name}: {problem}")
        on_pairs = method.stop_after is not None and method.trains_on == "preferences"
        if on_pairs and held_out is not None and not held_out.preferences:
            raise InputError(
                f"align.{name}.stop_after looks at held-out preferences, and data.evaluation has none; remove it, or "
                "give data.evaluation with preferences."
            )


def _check_evaluation(recipe: Recipe, looked: Mapping[str, _Looked]) -> None:
    """What `evaluate` names of the evaluation's rows, before anything is trained."""
    name = "preferences" if holds_out(recipe) else "evaluation"
    category, found = recipe.evaluate.category, looked.get(name)
    if found is not None and category is not None and category not in found.columns:
        raise InputError(f"evaluate.category: data.{name} has no column {category!r} beside those that it is read by.")
    first, sources = recipe.evaluate.first_prompt, getattr(recipe.data, name)
    if found is not None and first is not None and not are_cut(sources):
        rows = read_source(sources, Counter())
        if holds_out(recipe):
            pairs = [pair for record in rows for pair in preferences_of(record, Counter())]
            rows = iter(hold_out(pairs, recipe.data.held_out, recipe.evaluate.pairs, "data.preferences")[1])
        next(in_order(rows, first))


def _check_search(recipe: Recipe, looked: Mapping[str, _Looked]) -> None:
    """A first proposal for every method, and enough validation prompts, as far as they are local and not to be cut."""
    search, data = recipe.search, recipe.data
    if search is None:
        return
    for method, ranges in search.methods.items():
        propose(ranges, type(recipe.align[method]), [], trials=search.trials, seed=0)
    names = ("evaluation",) if data.validation is None else ("evaluation", "validation")
    if all(name in looked and not are_cut(getattr(data, name)) for name in names):
        rows, *own = (read_source(getattr(data, name), Counter()) for name in names)
        used, wanted = recipe.evaluate.prompts, search.prompts
        validation_prompts(rows, own[0] if own else None, Counter(), used=used, wanted=wanted)


def _local_sources(recipe: Recipe) -> dict[str, Sources]:
    """The recipe's data by name, as far as it is local; hub data is left to the stage that downloads it."""
    found: dict[str, Sources] = {}
    for name in ("sft", "labelled", "preferences", "prompts", "rewards", "evaluation", "validation"):
        sources = getattr(recipe.data, name)
        if sources is not None and all(exists(Path(one.source)) or looks_local(one.source) for one in each(sources)):
            found[name] = sources
    return found


def _check_record(name: str, settings: DataSettings, record: Record) -> None:
    ranked = record.rewards is not None and len(record.completions) > 1
    needs = {
        "data.preferences": ("a preference (prompt, chosen, rejected)", record.preferred is not None or ranked),
        "data.rewards": (
            "rewards: `rewards` beside `completions`, or a `label` of 0 or 1; `labels` says what other values mean, as "
            "labels.good=1 labels.bad=0",
            record.rewards is not None,
        ),
        "data.labelled": ("a label (text, label: 0 or 1)", record.rewards is not None),
        "data.sft": ("one completion", len(record.completions) < 2 or record.preferred is not None or ranked),
    }
    what, found = needs.get(name, ("", True))
    if not found:
        raise InputError(f"{name}: {settings.source}, row {record.id} lacks {what}.")


def check_model(settings: ModelSettings) -> None:
    """A local model folder must be there, with weights that can be read."""
    if settings.source is not None:
        if looks_local(settings.source) and not os.path.isdir(settings.source):
            raise InputError(f"The model folder {settings.source} does not exist.")
        check_weights(settings.source)
