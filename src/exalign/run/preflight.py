"""What can be found out before any long work: every row of the data is read once, every name is looked up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig

from exalign.data.reading import DataSettings, read_source
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.models.loading import first_line, is_folder, load_tokenizer
from exalign.models.model_settings import ModelSettings
from exalign.rollout.function_scorer import FunctionScorer
from exalign.run.cluster import check_installed
from exalign.run.proposals import Proposer
from exalign.run.recipe import Recipe, ScorerSettings
from exalign.run.search import own_settings, validation_prompts
from exalign.storage import exists


def check_inputs(recipe: Recipe) -> None:
    """Raise the `InputError` that a stage would raise hours later: bad rows, missing files, models and functions.

    Local data is read to its end, row by row; hub data is left to the stage that downloads it.
    """
    for name, settings in data_sources(recipe):
        for record in read_source(settings.model_copy(update={"prompt_tokens": None}), Counter()):
            _check_record(name, settings, record)
    for scorer in scorers(recipe):
        if scorer.function is not None:
            FunctionScorer(scorer.function)
        if scorer.reward_model is not None:
            check_labels(scorer.reward_model, 1)
        if scorer.classifier is not None:
            check_labels(scorer.classifier, 2)
    source = recipe.tokenizer.source or recipe.model.source
    if recipe.tokenizer.vocab_size is None and source is not None:
        load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code)
    critics = [settings.critic for settings in recipe.ppo.values()]
    for model in (recipe.model, recipe.oracle and recipe.oracle.model, recipe.reward and recipe.reward.model, *critics):
        if model:
            check_model(model)
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


def check_labels(source: str, wanted: int) -> None:
    """A scorer's model must have as many labels as its use needs; only its configuration is read."""
    try:
        found = AutoConfig.from_pretrained(source, trust_remote_code=False).num_labels
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"Cannot read the model {source}: {first_line(error)}") from None
    if wanted == 1 and found != 1:
        raise InputError(f"A reward model has one label, but {source} has {found}; name it as classifier instead.")
    if wanted == 2 and found < 2:
        raise InputError(f"A classifier has two labels, but {source} has {found}; name it as reward_model instead.")
