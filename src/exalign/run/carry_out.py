"""A recipe carried out: what can be found out before any long work, then its stages.

By one process, or by the first of several, which the others join where all train.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from exalign.data.reading import DataSettings, Sources, each, read_source, shared_prompts
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.models.capability import check_positions
from exalign.models.loading import check_trainable, is_folder, load_tokenizer, policy_skeleton
from exalign.models.model_settings import ModelSettings
from exalign.processes import calls, leading, leads
from exalign.rollout import vllm
from exalign.rollout.scorers import check_scorer
from exalign.rollout.settings import ScorerSettings
from exalign.run import cluster
from exalign.run.recipe import Recipe
from exalign.run.runner import Run, pin_to_run
from exalign.run.search import Proposer, validation_prompts
from exalign.run.stages import plan
from exalign.storage import exists
from exalign.terminal import shown


def run_recipe(
    recipe: Recipe, *targets: str, folder: str | Path | None = None, redo: bool = False, recover: bool = False
) -> Run:
    """Carry out a recipe in `folder` (default `runs/NAME`) up to the stages named; see `Run` and `Run.carry_out`."""
    place: Path = Path(folder) if folder is not None else None  # type: ignore[assignment]
    run = Run(recipe, place, redo=redo, recover=recover)
    carry_out(run, *targets)
    return run


def carry_out(run: Run, *targets: str) -> None:
    """Check everything that the recipe names, then carry out the stages.

    Of several processes the first one does so, and calls the others to the stages that train.
    """
    try:
        _carry_out(run, targets)
    finally:
        vllm.close_engine()


def _carry_out(run: Run, targets: tuple[str, ...]) -> None:
    stages = plan(run.recipe)
    if not leads():
        by_name = {stage.name: stage for stage in stages}
        for name in calls():
            pin_to_run(run.folder)
            by_name[name].work(run.view(by_name[name]))
        return
    with leading():
        if not run.is_complete(stages):
            check_inputs(run.recipe)
            if (sentence := shared_with_training(run.recipe)) is not None:
                run.console.print(shown(f"! {sentence}", "yellow"), soft_wrap=True)
        run.carry_out(stages, targets)


def check_inputs(recipe: Recipe) -> None:
    """Raise the `InputError` that a stage would raise hours later: bad rows, missing files, models and functions.

    Local data is read to its end, row by row; hub data is left to the stage that downloads it.
    """
    for name, sources in local_sources(recipe).items():
        for settings in each(sources):
            for record in read_source(whole(settings), Counter()):
                _check_record(name, settings, record)
    kinds = _kinds(recipe) if scorers(recipe) else []
    for scorer in scorers(recipe):
        check_scorer(scorer, kinds)
    source = recipe.tokenizer.source or recipe.model.source
    if recipe.tokenizer.vocab_size is None and source is not None:
        kwargs = recipe.tokenizer.chat_template_kwargs
        load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code, chat_template_kwargs=kwargs)
    for where, model in models_of(recipe).items():
        check_model(model)
        if where != "model" or recipe.sft is not None or recipe.align:
            check_trainable(model, where)
    if recipe.model.source is not None and (recipe.sft is not None or recipe.align):
        _check_lengths(recipe)
    if recipe.search is not None:
        _check_search(recipe)
    if recipe.cluster is not None:
        cluster.check_installed(recipe.cluster)
    if recipe.sample.engine == "vllm":
        vllm.check_installed()


def _check_lengths(recipe: Recipe) -> None:
    """The longest text that a stage may sample must have a position in the model."""
    settings = ModelSettings(source=recipe.model.source, trust_remote_code=recipe.model.trust_remote_code)
    longest = recipe.data.max_prompt_tokens + recipe.sample.max_new_tokens
    names = "data.max_prompt_tokens + sample.max_new_tokens"
    check_positions(policy_skeleton(settings).config, longest, settings=names, samples=True)


def shared_with_training(recipe: Recipe) -> str | None:
    """A sentence where prompts of the evaluation are among those that are trained on, as far as the data is local."""
    local = local_sources(recipe)
    rows = {
        name: [record for one in each(local[name]) for record in read_source(whole(one), Counter())]
        for name in ("data.evaluation", "data.preferences", "data.prompts", "data.rewards")
        if name in local
    }
    held_out = rows.pop("data.evaluation", None)
    for name, trained in rows.items() if held_out else ():
        shared, asked = shared_prompts(trained, held_out or ())
        if shared:
            return f"{shared:,} of the {asked:,} prompts of data.evaluation are in {name} too, and may be trained on."
    return None


def whole(settings: DataSettings) -> DataSettings:
    """The source with its texts not cut into prompt and completion, which takes a tokenizer."""
    return settings.model_copy(update={"prompt_tokens": None})


def _check_search(recipe: Recipe) -> None:
    """A first proposal for every method, and enough validation prompts, as far as they are local and not to be cut."""
    assert recipe.search is not None
    for method, ranges in recipe.search.methods.items():
        Proposer(ranges, type(recipe.align[method]), trials=recipe.search.trials, seed=0).propose([])
    names = ("data.evaluation",) if recipe.data.validation is None else ("data.evaluation", "data.validation")
    local = local_sources(recipe)
    if all(name in local and all(one.prompt_tokens is None for one in each(local[name])) for name in names):
        rows = [read_source(local[name], Counter()) for name in names]
        numbers = {"used": recipe.evaluate.prompts, "wanted": recipe.search.prompts}
        validation_prompts(rows[0], rows[1] if len(rows) > 1 else None, Counter(), **numbers)


def local_sources(recipe: Recipe) -> dict[str, Sources]:
    """The recipe's data by name, as far as it is local; hub data is left to the stage that downloads it."""
    found: dict[str, Sources] = {}
    for name in ("sft", "labelled", "preferences", "prompts", "rewards", "evaluation", "validation"):
        sources = getattr(recipe.data, name)
        if sources is not None and all(exists(Path(one.source)) or _looks_local(one.source) for one in each(sources)):
            found[f"data.{name}"] = sources
    return found


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix != ""


def scorers(recipe: Recipe) -> list[ScorerSettings]:
    """Every scorer that the recipe names."""
    named = [recipe.preferences and recipe.preferences.scorer, recipe.evaluate.scorer, recipe.score.scorer]
    return [scorer for scorer in named if scorer]


def models_of(recipe: Recipe) -> dict[str, ModelSettings]:
    """Every model that the recipe names to start from, by the place where it stands."""
    sections: dict[str, Any] = {"": recipe, "oracle": recipe.oracle, "reward": recipe.reward}
    sections |= {f"align.{name}": method for name, method in recipe.align.items()}
    return {
        f"{where}.{name}".lstrip("."): value
        for where, section in sections.items()
        for name in (type(section).model_fields if section is not None else ())
        if isinstance(value := getattr(section, name), ModelSettings)
    }


def _check_record(name: str, settings: DataSettings, record: Record) -> None:
    ranked = record.rewards is not None and len(record.completions) > 1
    needs = {
        "data.preferences": ("a preference (prompt, chosen, rejected)", record.preferred is not None or ranked),
        "data.rewards": ("rewards (prompt, completions, rewards)", record.rewards is not None),
        "data.labelled": ("a label (text, label: 0 or 1)", record.rewards is not None),
        "data.sft": ("a completion", len(record.completions) == 1 or record.preferred is not None or ranked),
    }
    what, found = needs.get(name, ("", True))
    if not found:
        raise InputError(f"{name}: {settings.source}, row {record.id} lacks {what}.")


def check_model(settings: ModelSettings) -> None:
    """A local model folder must be there and have a configuration."""
    if settings.source is not None and _looks_local(settings.source) and not is_folder(settings.source):
        raise InputError(f"The model folder {settings.source} does not exist.")


def _kinds(recipe: Recipe) -> list[Record]:
    """A record of each kind of prompt that may be sampled and scored, as far as the data is local."""
    found: dict[Any, Record] = {}
    for name, sources in local_sources(recipe).items():
        if name not in ("data.prompts", "data.preferences", "data.evaluation"):
            continue
        for settings in each(sources):
            for record in read_source(whole(settings), Counter()):
                said = record.prompt
                found.setdefault("text" if isinstance(said, str) else tuple(m["role"] for m in said), record)
    return list(found.values())
