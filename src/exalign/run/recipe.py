"""The recipe: one strict YAML file that says everything a run does.

Every setting has a type, a default, a one-line description and an effect. An unknown key, a wrong type, or a
setting that cannot take effect is an `InputError` that names the nearest right one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from exalign.data.reading import DataSettings
from exalign.errors import InputError
from exalign.models.model_settings import ModelSettings
from exalign.redaction import redact_values
from exalign.rollout.settings import SampleSettings, ScorerSettings
from exalign.run.cluster_settings import ClusterSettings
from exalign.run.messages import explain_validation_error
from exalign.run.search_settings import SearchSettings, search_contradictions
from exalign.settings import Settings
from exalign.strict_yaml import MAX_CHARACTERS, parse_yaml, plain_values
from exalign.training.settings import AlignSettings, ClassifierSettings, PPOSettings, RewardModelSettings, SFTSettings


class TokenizerSettings(Settings):
    """Which tokenizer the policy uses; by default the one that comes with `model.source`."""

    source: str | None = Field(None, description="folder or hub name of a tokenizer; None: the one of model.source")
    vocab_size: int | None = Field(
        None, gt=256, description="train a byte-level BPE of this size on data.sft instead (models from scratch)"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="settings of its chat template, e.g. {enable_thinking: false}"
    )


class DataSection(Settings):
    """What goes in. Each entry names a file, a folder or a hub data set."""

    sft: DataSettings | None = Field(None, description="texts or prompt/completion rows for supervised fine-tuning")
    labelled: DataSettings | None = Field(None, description="text/label rows (0 or 1) that train the oracle")
    preferences: DataSettings | None = Field(
        None, description="preference pairs; None: two samples of the supervised model, ordered by preferences.scorer"
    )
    prompts: DataSettings | None = Field(None, description="prompts to sample from; None: those of the preferences")
    rewards: DataSettings | None = Field(
        None, description="prompt/completions/rewards rows, used instead of the sample and score stages"
    )
    evaluation: DataSettings | None = Field(
        None, description="held-out prompts, with reference texts where the rows have them"
    )
    validation: DataSettings | None = Field(
        None,
        description="prompts that a search ranks its trials on, less those of the evaluation; None: those of "
        "data.evaluation that come after the evaluation's own",
    )
    max_prompt_tokens: int = Field(512, gt=1, description="longer prompts are cut on the left, once per group")
    max_completion_tokens: int = Field(
        512, gt=0, description="longer completions of data sets are cut on the right and get no end-of-sequence"
    )


class PreferenceSettings(Settings):
    """Preferences made by the run itself: two samples of the supervised model, ordered by a scorer."""

    scorer: ScorerSettings = Field(description="what orders the two samples; ties are dropped and counted")


class ScoreSettings(Settings):
    scorer: ScorerSettings = Field(
        default_factory=lambda: ScorerSettings(stage="reward"), description="what gives the rollouts their rewards"
    )


class EvaluateSettings(Settings):
    """The evidence: samples of every saved policy on held-out prompts, scored."""

    scorer: ScorerSettings | None = Field(
        None, description="what judges the samples; None: the oracle where there is one, else the score stage's"
    )
    prompts: int = Field(512, gt=0, description="evaluation prompts, the first of data.evaluation")
    samples: int = Field(4, gt=0, description="samples of each policy for each prompt (M in the paper)")
    pool_prompts: int = Field(
        128, ge=0, description="prompts with a pool of supervised samples for the optimal frontier; 0: none"
    )
    pool_samples: int = Field(128, gt=1, description="supervised samples for each pool prompt")
    density_prompts: int = Field(
        4,
        ge=0,
        description="pool prompts, the first ones, on whose samples every method's density ratio to the supervised "
        "model is computed; 0: none",
    )
    kl_budget: float | None = Field(
        None, gt=0, description="nats; the report names each method's best checkpoint within it"
    )


class Recipe(Settings):
    """Everything a run does, from data to report. `exalign recipe --explain` prints every setting."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="names the run directory, runs/NAME")
    seed: int = Field(0, ge=0, description="seeds weights, data order and every sample")
    temperature: float = Field(
        1.0, gt=0, description="τ: one temperature for sampling, training log-probabilities, KL and evaluation"
    )
    model: ModelSettings = Field(description="the policy to start from")
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings, description="the policy's tokenizer")
    data: DataSection = Field(default_factory=DataSection, description="what goes in")
    sft: SFTSettings | None = Field(None, description="supervised fine-tuning; None: the model is the supervised one")
    oracle: OracleSettings | None = Field(None, description="a classifier trained on data.labelled, to score with")
    preferences: PreferenceSettings | None = Field(None, description="preferences made from samples of this run")
    reward: RewardStageSettings | None = Field(None, description="a reward model trained on the preferences")
    sample: SampleSettings = Field(default_factory=SampleSettings, description="K completions per prompt")
    score: ScoreSettings = Field(default_factory=ScoreSettings, description="rewards for the rollouts")
    cluster: ClusterSettings | None = Field(
        None, description="workers on Ray that sample and score for the alignment; None: this process does"
    )
    align: dict[str, AlignSettings] = Field(
        default_factory=dict, description="methods to align with, each under a name of your own"
    )
    ppo: dict[str, PPOStageSettings] = Field(
        default_factory=dict,
        description="policies trained by PPO on samples that sample describes and score.scorer rewards, each under a "
        "name of your own",
    )
    search: SearchSettings | None = Field(
        None, description="a search for the settings with which each method does best; None: each has its own"
    )
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="the evidence")

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of all policies that the recipe aligns, in whatever way."""
        return (*self.align, *self.ppo)

    @model_validator(mode="after")
    def _can_take_effect(self) -> Recipe:
        for problem in contradictions(self):
            raise ValueError(problem)
        return self


class OracleSettings(ClassifierSettings):
    model: ModelSettings = Field(description="the classifier to start from; with a config it is trained from scratch")
    max_tokens: int = Field(512, gt=1, description="longer texts are cut on the right")


class RewardStageSettings(RewardModelSettings):
    model: ModelSettings | None = Field(None, description="the model to start from; None: the supervised policy")


class PPOStageSettings(PPOSettings):
    critic: ModelSettings | None = Field(
        None,
        description="the critic to start from, with the policy's tokenizer; None: this run's reward model where it "
        "started from the supervised policy, else the supervised policy with a new head",
    )


Recipe.model_rebuild()

TAKEN = {"sft", "prompts", "pool", "density"}
"""Folders beside those of the methods in evaluation/."""


def contradictions(recipe: Recipe) -> Iterable[str]:
    """Sentences about settings that cannot take effect together, or that lack what they need."""
    targets: set[str] = {settings.target for settings in recipe.align.values() if settings.rounds == 1}
    for section in ("align", "ppo"):
        if any(not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", n) or n in TAKEN for n in getattr(recipe, section)):
            yield (
                f"{section}: a method's name is made of up to 100 letters, digits, '.', '_' and '-', and is not 'sft', "
                "'prompts', 'pool' or 'density'"
            )
    for name in recipe.ppo:
        if name in recipe.align:
            yield f"ppo.{name} has the name of a method in align; give it another"
    if recipe.ppo and (recipe.sample.top_p is not None or recipe.sample.top_k is not None):
        yield "ppo needs samples of the policy itself; remove sample.top_p and sample.top_k"
    for name, ppo in recipe.ppo.items():
        if ppo.target_kl is None and ppo.kl_rate != PPOSettings.model_fields["kl_rate"].default:
            yield f"ppo.{name}.kl_rate has no effect without ppo.{name}.target_kl; remove it"
        if ppo.target_kl is not None and ppo.beta == 0:
            yield f"ppo.{name}.beta = 0 can never change, whatever ppo.{name}.target_kl is; start from a beta above 0"
    for name, settings in recipe.align.items():
        idle = "epsilon" if settings.target == "reward" else "beta_r"
        if getattr(settings, idle) != AlignSettings.model_fields[idle].default:
            yield f"align.{name}.{idle} has no effect on a {settings.target} target; remove it"
        if settings.divergence != "alpha" and settings.alpha != AlignSettings.model_fields["alpha"].default:
            yield f"align.{name}.alpha has no effect on the divergence {settings.divergence}; remove it"
        if settings.rounds > 1 and settings.target == "preference":
            yield f"align.{name}.rounds needs target: reward; preferences are not made while training"
    if recipe.model.source is None and recipe.tokenizer.source is None and recipe.tokenizer.vocab_size is None:
        yield "tokenizer: a model from scratch needs tokenizer.source or tokenizer.vocab_size"
    if recipe.tokenizer.source is not None and recipe.tokenizer.vocab_size is not None:
        yield "tokenizer: give source or vocab_size, not both"
    if recipe.tokenizer.vocab_size is not None and recipe.data.sft is None:
        yield "tokenizer.vocab_size needs data.sft to train the tokenizer on"
    if recipe.sft is not None and recipe.data.sft is None and recipe.data.preferences is None:
        yield "sft needs data.sft (or data.preferences, whose preferred completions it then uses)"
    if recipe.sft is None and recipe.model.source is None:
        yield "sft: a model from scratch needs the sft section"
    if recipe.oracle is not None and recipe.data.labelled is None:
        yield "oracle needs data.labelled, rows with text and label"
    if recipe.oracle is None and recipe.data.labelled is not None:
        yield "data.labelled has no effect without an oracle section"
    if recipe.preferences is not None and recipe.data.preferences is not None:
        yield "preferences has no effect beside data.preferences; remove one of them"
    yield from _missing_inputs(recipe, targets)


def _missing_inputs(recipe: Recipe, targets: set[str]) -> Iterable[str]:
    has_preferences = recipe.data.preferences is not None or recipe.preferences is not None
    for stage, needed in (("reward", recipe.reward is not None), ("align", "preference" in targets)):
        if needed and not has_preferences:
            yield f"{stage} needs preferences: give data.preferences, or preferences.scorer to make them from samples"
    on_policy = bool(recipe.ppo) or any(settings.rounds > 1 for settings in recipe.align.values())
    rewarded = on_policy or ("reward" in targets and recipe.data.rewards is None)
    drawn = recipe.preferences is not None or rewarded
    if drawn and recipe.sample.max_new_tokens > recipe.data.max_completion_tokens:
        yield (
            f"sample.max_new_tokens = {recipe.sample.max_new_tokens} is above data.max_completion_tokens = "
            f"{recipe.data.max_completion_tokens}, and sampled completions are never cut; raise the latter"
        )
    if recipe.sample.max_prompt_tokens != SampleSettings.model_fields["max_prompt_tokens"].default:
        yield "sample.max_prompt_tokens has no effect in a recipe; set data.max_prompt_tokens"
    has_prompts = recipe.data.prompts is not None or recipe.data.preferences is not None
    if drawn and not has_prompts:
        yield "data.prompts is missing: it says which prompts to sample from"
    if recipe.data.rewards is not None and recipe.score != ScoreSettings() and not on_policy:
        yield "score has no effect beside data.rewards, which brings its own rewards; remove one of them"
    if recipe.cluster is not None:
        if recipe.preferences is None and not ("reward" in targets and recipe.data.rewards is None):
            yield "cluster has no effect: no stage of this recipe samples or scores for the alignment; remove it"
        if recipe.cluster.vllm is not None and recipe.cluster.gpus_per_worker == 0:
            yield "cluster.vllm needs a GPU; remove cluster.gpus_per_worker = 0"
    scorers: dict[str, ScorerSettings | None] = {}
    if recipe.preferences is not None:
        scorers["preferences.scorer"] = recipe.preferences.scorer
    if rewarded:
        scorers["score.scorer"] = recipe.score.scorer
    scorers["evaluate.scorer"] = recipe.evaluate.scorer
    for where, scorer in scorers.items():
        for stage in () if scorer is None else scorer.stages:
            if getattr(recipe, stage) is None:
                yield f"{where} names the stage {stage!r}, but the recipe has no {stage} section"
            if where == "preferences.scorer" and stage == "reward":
                yield "preferences.scorer cannot be this run's reward model, which is trained on those preferences"
    evaluate = recipe.evaluate
    usual = EvaluateSettings.model_fields["density_prompts"].default
    if evaluate.density_prompts > evaluate.pool_prompts and evaluate.density_prompts != usual:
        yield "evaluate.density_prompts is above evaluate.pool_prompts, whose samples it needs; raise the latter"
    if recipe.methods and recipe.data.evaluation is None:
        yield "data.evaluation is missing: held-out prompts for the evidence"
    yield from search_contradictions(recipe, contradictions)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides (dotted keys, YAML values).

    Relative paths of local data and models are taken from the working directory, as in a shell.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:  # which may be no file at all, and have no end
            text = stream.read(4 * MAX_CHARACTERS + 1).decode("utf-8")
    except FileNotFoundError:
        near = ", ".join(sorted(str(other) for other in path.parent.glob("*.yaml"))[:8]) if path.parent.is_dir() else ""
        raise InputError(f"{path} does not exist{'; there are ' + near if near else ''}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)[:200]} cannot be read ({str(error)[:200]}).") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of settings, this is {type(values).__name__}.")
    for override in overrides:
        _apply_override(values, override)
    return make_recipe(values, str(path))


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; every problem becomes one sentence."""
    # Keys that start with "x-" hold YAML anchors and are otherwise ignored.
    values = {key: value for key, value in values.items() if not str(key).startswith("x-")}
    try:
        # Through JSON, where a YAML list may be a tuple but a string is never a number.
        return Recipe.model_validate_json(json.dumps(plain_values(values, where)))
    except ValidationError as error:
        raise InputError(f"{where}: {explain_validation_error(error, Recipe)}") from None


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe: every setting that has a value, credentials in addresses blotted out."""
    return redact_values(json.loads(recipe.model_dump_json(exclude_none=True)))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override[:200]!r} is not KEY=VALUE, for example align.exo-rw.beta_pi=0.5.")
    target = values
    *parents, last = key.split(".")
    for name in parents:
        if target.get(name) is None:
            target[name] = {}
        target = target[name]
        if not isinstance(target, dict):
            raise InputError(f"{override[:200]!r}: {name} is a single value and has no settings below it.")
    target[last] = parse_yaml(text, key[:200])
