"""What can be found out before any long work: every row of the data is read once, every name is looked up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exalign.data.reading import DataSettings, read_source
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.models.loading import check_trainable, is_folder, load_tokenizer
from exalign.models.model_settings import ModelSettings
from exalign.rollout.scorers import check_scorer
from exalign.rollout.settings import ScorerSettings
from exalign.run.cluster import check_installed
from exalign.run.proposals import Proposer
from exalign.run.recipe import Recipe
from exalign.run.search import own_settings, validation_prompts
from exalign.storage import exists


def check_inputs(recipe: Recipe) -> None:
    """Raise the `InputError` that a stage would raise hours later: bad rows, missing files, models and functions.

    Local data is read to its end, row by row; hub data is left to the stage that downloads it.
    """
    for name, settings in data_sources(recipe):
        for record in read_source(settings.model_copy(update={"prompt_tokens": None}), Counter()):
            _check_record(name, settings, record)
    kinds = _kinds(recipe) if scorers(recipe) else []
    for scorer in scorers(recipe):
        check_scorer(scorer, kinds)
    source = recipe.tokenizer.source or recipe.model.source
    if recipe.tokenizer.vocab_size is None and source is not None:
        load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code)
    critics = [settings.critic for settings in recipe.ppo.values()]
    for model in (recipe.model, recipe.oracle and recipe.oracle.model, recipe.reward and recipe.reward.model, *critics):
        if model:
            check_model(model)
    if recipe.sft is not None or recipe.methods:
        check_trainable(recipe.model, "model")
    if recipe.oracle is not None:
        check_trainable(recipe.oracle.model, "oracle.model")
    if recipe.reward is not None and recipe.reward.model is not None:
        check_trainable(recipe.reward.model, "reward.model")
    for name, method in recipe.ppo.items():
        if method.critic is not None:
            check_trainable(method.critic, f"ppo.{name}.critic")
    if recipe.search is not None:
        _check_search(recipe)
    if recipe.cluster is not None:
        check_installed(recipe.cluster)


def _check_search(recipe: Recipe) -> None:
    """A first proposal for every method, and enough validation prompts, as far as they are local and not to be cut."""
    assert recipe.search is not None
    for method, ranges in recipe.search.methods.items():
        Proposer(ranges, type(own_settings(recipe, method)), trials=recipe.search.trials, seed=0).propose([])
    names = ("evaluation",) if recipe.data.validation is None else ("evaluation", "validation")
    local = {name.removeprefix("data."): settings for name, settings in data_sources(recipe)}
    if all(name in local and local[name].prompt_tokens is None for name in names):
        rows = {name: read_source(local[name], Counter()) for name in names}
        validation_prompts(recipe, rows["evaluation"], rows.get("validation"), Counter())


def data_sources(recipe: Recipe) -> Iterator[tuple[str, DataSettings]]:
    """The recipe's data by name, as far as it is local and not yet records of our own."""
    for name in ("sft", "labelled", "preferences", "prompts", "rewards", "evaluation", "validation"):
        settings = getattr(recipe.data, name)
        if settings is not None and (exists(Path(settings.source)) or _looks_local(settings.source)):
            yield f"data.{name}", settings


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix != ""


def scorers(recipe: Recipe) -> list[ScorerSettings]:
    """Every scorer that the recipe names."""
    named = [recipe.preferences and recipe.preferences.scorer, recipe.evaluate.scorer, recipe.score.scorer]
    return [scorer for scorer in named if scorer]


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
    for name, settings in data_sources(recipe):
        if name not in ("data.prompts", "data.preferences", "data.evaluation"):
            continue
        for record in read_source(settings.model_copy(update={"prompt_tokens": None}), Counter()):
            said = record.prompt
            found.setdefault("text" if isinstance(said, str) else tuple(m["role"] for m in said), record)
    return list(found.values())
