"""What the stages of one run share: its tokenizer, models, data and scorers, loaded on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.batching import Group
from exalign.data.reading import DataSettings, read_source
from exalign.data.record import Record
from exalign.data.store import iter_records
from exalign.data.tokenization import TokenLimits, tokenize_records
from exalign.device import device
from exalign.errors import InputError
from exalign.models.loading import load_policy, load_tokenizer
from exalign.models.model_settings import ModelSettings
from exalign.rollout.scorers import Scorer, function_identity, open_scorer
from exalign.rollout.settings import ScorerSettings
from exalign.run.recipe import Recipe
from exalign.run.runner import Run
from exalign.storage import exists, fingerprint_path
from exalign.training.settings import TrainSettings

SCORING_TOKENS = 8192
"""Tokens per forward pass where no gradient is kept: memory and speed, never a result."""


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation mode, on the accelerator where there is one."""
    model.to(device())  # type: ignore[arg-type]
    return model.eval()


Trained = TypeVar("Trained", bound=TrainSettings)


def seeded(settings: Trained, recipe: Recipe) -> Trained:
    """A stage's settings with the recipe's seed added to its own."""
    return settings.model_copy(update={"seed": recipe.seed + settings.seed})


def load_run_tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """The policy's tokenizer: trained by this run, named by the recipe, or the one of the model."""
    recipe = run.recipe
    trained = str(run.path("tokenizer")) if recipe.tokenizer.vocab_size is not None else None
    source = trained or recipe.tokenizer.source or recipe.model.source
    assert source is not None  # the recipe's own check
    return load_tokenizer(
        source,
        trust_remote_code=recipe.model.trust_remote_code,
        chat_template_kwargs=recipe.tokenizer.chat_template_kwargs,
    )


def supervised_needs(recipe: Recipe) -> tuple[str, ...]:
    """The stages that make π_sft and its tokenizer."""
    if recipe.sft is not None:
        return ("sft",)
    return ("tokenizer",) if recipe.tokenizer.vocab_size is not None else ()


def model_identity(recipe: Recipe) -> Any:
    """What the recipe's own model and tokenizer are: settings, and the content of local folders."""
    return [
        recipe.model.model_dump(mode="json"),
        source_identity(recipe.model.source),
        source_identity(recipe.tokenizer.source),
    ]


def supervised_settings(run: Run) -> ModelSettings:
    """π_sft: what the sft stage made, else the model that the recipe starts from."""
    if run.recipe.sft is None:
        return run.recipe.model
    return run.recipe.model.model_copy(update={"source": str(run.path("sft", "model")), "config": None})


def load_supervised(run: Run, tokenizer: PreTrainedTokenizerBase, *, trainable: bool = False) -> PreTrainedModel:
    """π_sft; with fresh LoRA adapters only where it is to be trained."""
    settings = supervised_settings(run)
    return load_policy(settings if trainable else settings.model_copy(update={"lora": None}), tokenizer)


def load_frozen_policy(folder: Path, run: Run, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A policy that the run wrote, in evaluation mode on the device."""
    settings = run.recipe.model.model_copy(update={"source": str(folder), "config": None, "lora": None})
    return ready(load_policy(settings, tokenizer))


def data_identity(settings: DataSettings | None) -> Any:
    """What a stage's content depends on: the settings and, for local data, the content itself."""
    if settings is None:
        return None
    path = Path(settings.source)
    return {
        **settings.model_dump(mode="json"),
        "content": fingerprint_path(path, remember=True) if exists(path) else None,
    }


def source_identity(source: str | None) -> Any:
    """A model's name and, for a local folder, its content."""
    if source is None:
        return None
    path = Path(source)
    return {"source": source, "content": fingerprint_path(path, remember=True) if exists(path) else None}


def scorer_identity(settings: ScorerSettings) -> Any:
    """The settings, the models that they name, and the files that reward functions stand in."""
    models = [source_identity(source) for source in settings.sources]
    return {
        **settings.model_dump(mode="json"),
        "models": models,
        "functions": [function_identity(name) for name in settings.functions],
    }


def scorer_needs(settings: ScorerSettings) -> tuple[str, ...]:
    return settings.stages


def load_scorer(settings: ScorerSettings, run: Run) -> Scorer:
    """The scorer that a recipe names, ready to score; a model that was trained here reads what it was trained on."""

    def trained_here(stage: str) -> tuple[str, TokenLimits]:
        return str(run.path(stage, "model")), trained_limits(run.recipe, stage)

    return open_scorer(settings, trained_here)


def trained_limits(recipe: Recipe, stage: str) -> TokenLimits:
    """What the run's own reward model or oracle is trained on of each text."""
    if stage == "oracle":
        assert recipe.oracle is not None
        longest = recipe.oracle.max_tokens
        return TokenLimits(max_prompt_tokens=longest, max_completion_tokens=longest)
    data = recipe.data
    return TokenLimits(max_prompt_tokens=data.max_prompt_tokens, max_completion_tokens=data.max_completion_tokens)


def tokenize(run: Run, records: list[Record], tokenizer: PreTrainedTokenizerBase, counts: Counter[str]) -> list[Group]:
    """Token groups of the records under the recipe's limits; an empty result is an error."""
    data = run.recipe.data
    groups = list(
        tokenize_records(
            records,
            tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            max_completion_tokens=data.max_completion_tokens,
            counts=counts,
        )
    )
    if not groups:
        raise InputError("No usable rows are left; `exalign inspect DATA --model M` shows what happens to each.")
    return groups


def iter_records_of(settings: DataSettings, run: Run, counts: Counter[str]) -> Iterator[Record]:
    """The records of a data source; texts are split into prompt and completion by the run's tokenizer."""
    return read_source(settings, counts, load_run_tokenizer(run) if settings.prompt_tokens is not None else None)


def read_records_of(settings: DataSettings, run: Run, counts: Counter[str]) -> list[Record]:
    """All records of a data source; none at all is an error."""
    records = list(iter_records_of(settings, run, counts))
    if not records:
        raise InputError(f"{settings.source} has no usable rows.")
    return records


def iter_prompts(run: Run, counts: Counter[str]) -> Iterator[Record]:
    """The prompts to sample from, without their completions, as they are read; none at all is an error."""
    source, record = run.recipe.data.prompts, None
    if source is None:
        records = iter_records(run.path("preferences", "records"))
    else:
        records = iter_records_of(source, run, counts)
    for record in records:
        yield replace(record, completions=(), preferred=None)
    if record is None:
        raise InputError(f"{source.source if source else run.path('preferences')} has no usable rows.")


def prompts_of(run: Run, counts: Counter[str]) -> list[Record]:
    """All prompts to sample from, each once."""
    return list({record.id: record for record in iter_prompts(run, counts)}.values())
