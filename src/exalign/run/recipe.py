"""The recipe: one strict YAML file that says everything a run does.

Every setting has a type, a default, a one-line description and an effect. An unknown key, a wrong type, or a
setting that cannot take effect is an `InputError` that names the nearest right one.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, PlainValidator, SerializeAsAny, ValidationError, model_validator

from exalign.data.reading import Sources, data_suffix
from exalign.errors import InputError, nearest
from exalign.evaluation.run_folder import BEST_OF, NO_METHODS
from exalign.methods.method import Method, method_class
from exalign.methods.oracle import Oracle
from exalign.methods.reward_model import RewardModel
from exalign.methods.sft import SFT
from exalign.models.model_settings import ModelSettings
from exalign.redaction import redact_values
from exalign.rollout.settings import SampleSettings, ScorerSettings, TopP, VLLMSettings
from exalign.run.familiar import loss_meaning, meaning
from exalign.settings import CONTENT, NO_RESULT, Settings, Source
from exalign.strict_yaml import MAX_CHARACTERS, parse_yaml, plain_values

_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,%d}"
RECIPES = Path(__file__).parents[1] / "recipes"
"""Those that come with exalign."""


class TokenizerSettings(Settings):
    """Which tokenizer the policy uses; by default the one that comes with `model.source`."""

    source: Source | None = Field(
        None,
        description="folder or hub name of a tokenizer; null: the one of model.source",
        json_schema_extra=CONTENT,
    )
    vocab_size: int | None = Field(
        None, gt=256, description="train a byte-level BPE of this size on data.sft instead (models from scratch)"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="settings of its chat template, e.g. {enable_thinking: false}"
    )


class DataSection(Settings):
    """What goes in. Each entry names a file, a folder or a hub data set, or is a list of them."""

    sft: Sources | None = Field(None, description="texts or prompt/completion rows for supervised fine-tuning")
    labelled: Sources | None = Field(None, description="text/label rows (0 or 1) that train the oracle")
    preferences: Sources | None = Field(
        None, description="preference pairs; null: two samples of the supervised model, ordered by preferences.scorer"
    )
    prompts: Sources | None = Field(None, description="prompts to sample from; null: those of the preferences")
    rewards: Sources | None = Field(
        None, description="prompt/completions/rewards rows, used instead of the sample and score stages"
    )
    evaluation: Sources | None = Field(
        None,
        description="held-out prompts, with reference texts or preferences where the rows have them; null: a part of "
        "data.preferences, see held_out",
    )
    held_out: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="without data.evaluation: the share of the prompts of data.preferences that nothing is trained on, "
        "drawn by the content of each prompt, and at most evaluate.pairs of them; of methods on rewards with "
        "stop_after: the share of their prompts that says when training ends",
    )
    validation: Sources | None = Field(
        None,
        description="prompts that a search ranks its trials on, less those of the evaluation; null: those of "
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
    """Rewards for the rollouts."""

    scorer: ScorerSettings | None = Field(
        None, description="what gives the rollouts their rewards; null: this run's reward model"
    )


class AnswerSettings(Settings):
    """How answers are drawn that are judged: as a user would draw them, not as the methods' KL needs them."""

    temperature: float = Field(gt=0, description="temperature of these answers alone")
    top_p: TopP = Field(
        None, gt=0, le=1, description="keep the most probable tokens up to this total probability; null: all"
    )


class EvaluateSettings(Settings):
    """The evidence: samples of every saved policy on held-out prompts, scored."""

    scorer: ScorerSettings | None = Field(
        None,
        description="what judges the samples; null: the oracle where there is one, else score.scorer, else the reward "
        "model; without any the evidence is what preferences allow",
    )
    prompts: int = Field(512, gt=0, description="evaluation prompts, the first of data.evaluation")
    pairs: int = Field(
        512,
        gt=0,
        description="held-out preferences that trainings are measured on along the way, and every policy for the "
        "evidence: the first of data.evaluation",
    )
    first_prompt: str | None = Field(
        None,
        min_length=1,
        description="how a prompt of data.evaluation begins, which then comes first of all, so that its density ratios "
        "are drawn (the paper's Figure 3); null: the order of the data",
    )
    samples: int = Field(4, gt=0, description="samples of each policy for each prompt (M in the paper)")
    answers: AnswerSettings | None = Field(
        None,
        description="samples of their own, as many again, for win rates, judges and people; null: those that rewards "
        "and KL are measured on, which are drawn at τ and never truncated",
    )
    pool_prompts: int = Field(
        128,
        ge=0,
        description="prompts with a pool of supervised samples for the optimal frontier, the first of data.evaluation; "
        "0: none",
    )
    pool_samples: int = Field(128, gt=1, description="supervised samples for each pool prompt")
    density_prompts: int = Field(
        4,
        ge=0,
        description="pool prompts, the first ones, on whose samples every method's density ratio to the supervised "
        "model is computed; 0: none",
    )
    category: str | None = Field(
        None,
        min_length=1,
        description="column of data.evaluation that says of which kind a prompt is; each has win rates of its own",
        json_schema_extra=NO_RESULT,
    )
    kl_budget: float | None = Field(
        None,
        gt=0,
        description="nats; the report names each method's best checkpoint within it",
        json_schema_extra=NO_RESULT,
    )


class ClusterSettings(Settings):
    """A pool of workers on Ray for the stages that sample and score; it changes speed, never a completion."""

    workers: int = Field(1, ge=1, description="processes that each hold the model and take one shard after another")
    address: str | None = Field(
        None,
        min_length=1,
        description="a running Ray cluster, as host:port; null: one on this machine, for the stage alone",
    )
    cpus_per_worker: int = Field(1, ge=1, description="threads that each worker computes with on the processor")
    gpus_per_worker: int | None = Field(
        None, ge=0, description="GPUs of each worker; null: one where the cluster has any, else none"
    )
    tries: int = Field(
        4, ge=1, description="how often a shard is begun anew because its worker died, before the stage fails"
    )


Value = bool | int | float | str | None

_FIXED = {
    "method": "give the other method a name of its own",
    "seed": "a search over seeds would choose luck",
    "save_policies": "it decides which policies a trial is ranked by",
    "target": "the stages before the method are made for it; give the other target a method of its own",
    "fresh_every": "the stages before the method are made for it; give the other one a method of its own",
    "num_completions": "what a method trains on is made for it; give the other K a method of its own",
    "precision": "the stages before the method are made for it; give the other precision a method of its own",
    "stop_after": "what it holds out is kept from every trial; set it in the method",
}
"""Settings that are not searched over, and why; nor are those that change no result."""


class Range(Settings):
    """The values that a setting may take: all between two numbers, or some that are listed."""

    low: int | float | None = Field(None, description="least value")
    high: int | float | None = Field(None, description="greatest value")
    log: bool = Field(False, description="spread the values evenly in their logarithm")
    choices: tuple[Value, ...] | None = Field(None, description="the values themselves, instead of low and high")

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("give choices, or low and high, not both")
            if not self.choices or len({(type(value), value) for value in self.choices}) < len(self.choices):
                raise ValueError("choices must be at least one value, and each once")
        elif self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        elif not self.low < self.high:
            raise ValueError(f"low must be below high, and {self.low} is not below {self.high}")
        elif self.log and not self.low > 0:
            raise ValueError(f"log needs low above 0, not {self.low}")
        return self

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Every choice, or both ends."""
        return (self.low, self.high) if self.choices is None else self.choices

    def contains(self, value: Any) -> bool:
        """Whether the value is one of those."""
        if self.choices is not None:
            return value in self.choices
        return value is not None and self.low <= value <= self.high


class SearchSettings(Settings):
    """A search for the settings with which each method does best, before it is aligned with them.

    Trial 0 has the recipe's own settings. A trial's value is its mean reward on validation prompts at `kl` nats from
    π_sft, interpolated along its saved policies, or at its reach where that is less. Ranges that are all lists, with
    no more combinations than trials, are tried as a grid.
    """

    trials: int = Field(8, gt=1, description="trials of each method, the recipe's own settings among them")
    kl: float = Field(
        gt=0, description="nats; trials are ranked by reward at this KL, or at the largest below it that they all reach"
    )
    prompts: int = Field(
        64, gt=0, description="validation prompts: of data.validation, or of data.evaluation after evaluate.prompts"
    )
    samples: int = Field(2, gt=0, description="samples of each saved policy of a trial for each validation prompt")
    methods: dict[str, dict[str, Range]] = Field(
        min_length=1, description="for each method of align that is searched: its settings, each with a range"
    )


def changed(settings: Method, values: Mapping[str, Value]) -> Method:
    """The settings with other values for some; what a setting does not allow is pydantic's `ValidationError`."""
    return type(settings).model_validate_json(json.dumps({**settings.model_dump(mode="json"), **values}))


def as_method(value: Any) -> Method:
    """A section of `align` as the object that its `method` names; pydantic's `ValidationError` where it is none."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, dict):
        raise ValueError("a method is a mapping of settings")
    try:
        chosen = method_class(str(value.get("method", "matching")))
    except InputError as error:
        raise ValueError(str(error).removesuffix(".")) from None
    return chosen.model_validate_json(json.dumps(value))


AnyMethod = Annotated[SerializeAsAny[Method], PlainValidator(as_method)]


class Recipe(Settings):
    """Everything a run does, from data to report. `exalign recipe --explain` prints every setting."""

    name: str = Field(pattern=f"^{_NAME % 99}$", description="names the run directory, runs/NAME")
    seed: int = Field(0, ge=0, description="seeds weights, data order and every sample")
    temperature: float = Field(
        1.0, gt=0, description="τ: one temperature for sampling, training log-probabilities, KL and evaluation"
    )
    threads: int | None = Field(
        None,
        gt=0,
        description="of the CPU; null: as many as are fastest when the run begins, or as OMP_NUM_THREADS says",
        json_schema_extra=NO_RESULT,
    )
    model: ModelSettings = Field(description="the policy to start from")
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings, description="the policy's tokenizer")
    data: DataSection = Field(default_factory=DataSection, description="what goes in")
    sft: SFT | None = Field(None, description="supervised fine-tuning; null: the model is the supervised one")
    oracle: Oracle | None = Field(None, description="a classifier trained on data.labelled, to score with")
    preferences: PreferenceSettings | None = Field(None, description="preferences made from samples of this run")
    reward: RewardModel | None = Field(None, description="a reward model trained on the preferences")
    sample: SampleSettings = Field(default_factory=SampleSettings, description="K completions per prompt")
    score: ScoreSettings = Field(default_factory=ScoreSettings, description="rewards for the rollouts")
    cluster: ClusterSettings | None = Field(
        None,
        description="workers on Ray that sample and score for the alignment; null: this process does",
        json_schema_extra=NO_RESULT,
    )
    align: dict[str, AnyMethod] = Field(
        default_factory=dict,
        description="methods to align with, each under a name of your own; `method` says which, and its other settings "
        "are that method's",
    )
    search: SearchSettings | None = Field(
        None, description="a search for the settings with which each method does best; null: each has its own"
    )
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="the evidence")

    @property
    def scoring(self) -> ScorerSettings | None:
        """What gives the rollouts their rewards: as the recipe says, else its reward model; None: nothing."""
        return self.score.scorer or (None if self.reward is None else ScorerSettings(stage="reward"))

    @property
    def judging(self) -> ScorerSettings | None:
        """What judges the samples of the evaluation: as the recipe says, else the oracle, else what scores rollouts."""
        return self.evaluate.scorer or (self.scoring if self.oracle is None else ScorerSettings(stage="oracle"))

    @model_validator(mode="after")
    def _can_take_effect(self) -> Recipe:
        for problem in contradictions(self):
            raise ValueError(problem)
        return self


def contradictions(recipe: Recipe) -> Iterable[str]:
    """Sentences about settings that cannot take effect together, or that lack what they need."""
    yield from _method_problems(recipe)
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
    aligned = "" if any(not method.given for method in recipe.align.values()) else ", and this recipe trains none"
    for where, model in models_of(recipe).items():
        if model.saves_adapter and (where != "model" or aligned):
            yield f"{where}.lora.save = adapter is for policies of the alignment{aligned}; remove it"
    if recipe.oracle is not None and recipe.data.labelled is None:
        yield "oracle needs data.labelled, rows with text and label"
    if recipe.oracle is None and recipe.data.labelled is not None:
        yield "data.labelled has no effect without an oracle section"
    if recipe.preferences is not None and recipe.data.preferences is not None:
        yield "preferences has no effect beside data.preferences; remove one of them"
    yield from _missing_inputs(recipe)
    yield from _idle_data(recipe)
    yield from _scorer_problems(recipe)
    yield from _evaluation_problems(recipe)
    yield from _search_problems(recipe)


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


def _method_problems(recipe: Recipe) -> Iterator[str]:
    fits = re.compile(_NAME % 39).fullmatch
    if any(not fits(name) or name.lower() in NO_METHODS or name.startswith(BEST_OF) for name in recipe.align):
        yield (
            "align: a method's name is made of up to 40 letters, digits, '.', '_' and '-', does not begin "
            f"with {BEST_OF!r}, and is not " + ", ".join(map(repr, sorted(NO_METHODS)))
        )
    lower = {name.lower(): name for name in recipe.align}
    for name in [name for name in recipe.align if name not in lower.values()]:
        yield f"align: {name} and {lower[name.lower()]} are one folder where case does not count; rename one"
    for name, method in recipe.align.items():
        problems = [*method.problems()]
        drawn, own = recipe.sample.num_completions, method.num_completions
        offline = method.trains_on == "rewards" and recipe.data.rewards is None
        if own is not None and method.trains_on not in ("prompts", "rewards"):
            problems.append("num_completions has no effect on a method without rewards; remove it")
        elif own is not None and offline and own > drawn:
            problems.append(
                f"num_completions = {own} is above sample.num_completions = {drawn}, which are drawn; raise the latter"
            )
        elif offline or method.trains_on == "prompts":
            problems += method.sampling_problems(recipe.sample.model_copy(update={"num_completions": own or drawn}))
        problems += _stop_problems(recipe, method)
        yield from (f"align.{name}: {problem}" for problem in problems)
        yield from (f"align.{name}.sweep{problem}" for problem in _sweep_problems(recipe, method))


def _stop_problems(recipe: Recipe, method: Method) -> Iterator[str]:
    """An early stop that nothing would measure, or that could not come."""
    if method.stop_after is None:
        return
    if not holds_out_rewards(method) and (method.trains_on != "preferences" or recipe.data.preferences is None):
        yield "stop_after looks at held-out data.preferences or rewards, and this method trains on neither; remove it"
    elif method.stop_after >= method.save_policies:
        yield f"stop_after = {method.stop_after} counts saved policies; raise save_policies above it"


def _sweep_problems(recipe: Recipe, method: Method) -> Iterator[str]:
    """A sweep that names no one setting, or values with which the method could not train."""
    if method.sweep is None:
        return
    setting, values = method.swept or ("", ())
    if len(method.sweep) != 1 or not values or len(set(values)) < len(values):
        yield " is one setting with its values, each once, as {beta_r: [0.5, 0.1]} or {kl: [0.5, 1, 2]}"
        return
    if method.save_policies != 1 and method.stop_after is None:
        yield " keeps the last policy of each training alone; remove save_policies"
    if setting == "kl":
        if method.optimum_beta is None:
            yield ": kl chooses the β of the optimum that a method aims at, and this one aims at none"
        elif not recipe.evaluate.pool_prompts or recipe.judging is None:
            yield ": kl needs the evaluation's pool: evaluate.pool_prompts above 0, and a scorer"
        elif method.trains_on == "rewards" and recipe.data.rewards is not None:
            yield ": kl chooses β by the pool's rewards, and data.rewards brings its own; give values of beta_r"
        elif min(values) <= 0:
            yield f": an optimum lies at more than 0 nats, not at {min(values):g}"
        for name in ("beta", "beta_r", "beta_r_std"):
            if name in type(method).model_fields and method.changed(name):
                yield f": kl chooses β, beside which {name} has no effect; remove it"
        return
    for problem in _range_problems(method, setting, Range(choices=values)):
        yield f".{setting}{problem}"
        return
    for value in values:
        yield from (f": {setting} = {value:g}: {problem}" for problem in method.at(setting, value).problems())


def trained_on(recipe: Recipe) -> set[str]:
    """What the recipe's methods train on."""
    return {method.trains_on for method in recipe.align.values()}


def samples_are_scored(recipe: Recipe) -> bool:
    """Whether any method needs rewards of samples that this run draws."""
    wanted = trained_on(recipe)
    return "prompts" in wanted or ("rewards" in wanted and recipe.data.rewards is None)


def _idle_data(recipe: Recipe) -> Iterator[str]:
    """Data that nothing would be made from."""
    if recipe.data.sft is not None and recipe.sft is None and recipe.tokenizer.vocab_size is None:
        yield "data.sft has no effect without an sft section; add sft={} or remove it"
    drawn = recipe.preferences is not None or samples_are_scored(recipe)
    if recipe.data.prompts is not None and recipe.align and not drawn:
        yield "data.prompts has no effect: nothing that is trained is made from samples; remove it"
    if recipe.data.rewards is not None and recipe.align and "rewards" not in trained_on(recipe):
        yield "data.rewards has no effect: no method trains on rewards; remove it"


def _missing_inputs(recipe: Recipe) -> Iterator[str]:
    wanted, scored = trained_on(recipe), samples_are_scored(recipe)
    has_preferences = recipe.data.preferences is not None or recipe.preferences is not None
    for stage, needed in (("reward", recipe.reward is not None), ("align", "preferences" in wanted)):
        if needed and not has_preferences:
            given = stage == "align" and recipe.data.rewards is not None
            other = "; target: reward trains on data.rewards, with methods that have it" if given else ""
            yield (
                f"{stage} needs preferences: give data.preferences, or preferences.scorer to make them from "
                f"samples{other}"
            )
    drawn = recipe.preferences is not None or scored
    if drawn and recipe.sample.max_new_tokens > recipe.data.max_completion_tokens:
        yield (
            f"sample.max_new_tokens = {recipe.sample.max_new_tokens} is above data.max_completion_tokens = "
            f"{recipe.data.max_completion_tokens}, and sampled completions are never cut; raise the latter"
        )
    if recipe.sample.engine == "exalign" and recipe.sample.vllm != VLLMSettings():
        yield "sample.vllm has no effect with sample.engine: exalign"
    if recipe.sample.max_prompt_tokens != SampleSettings.model_fields["max_prompt_tokens"].default:
        yield "sample.max_prompt_tokens has no effect in a recipe; set data.max_prompt_tokens"
    if drawn and recipe.data.prompts is None and recipe.data.preferences is None:
        yield "data.prompts is missing: it says which prompts to sample from"
    if recipe.data.rewards is not None and recipe.score != ScoreSettings() and "prompts" not in wanted:
        yield "score has no effect beside data.rewards, which brings its own rewards; remove one of them"
    pooled = recipe.preferences is not None or ("rewards" in wanted and recipe.data.rewards is None)
    if recipe.cluster is not None and not pooled:
        yield "cluster has no effect: no stage of this recipe samples or scores for the alignment; remove it"


def _scorer_problems(recipe: Recipe) -> Iterator[str]:
    scored = samples_are_scored(recipe)
    if scored and recipe.scoring is None:
        yield (
            "score.scorer is missing: give what rewards the samples (a function, a reward_model, a classifier), or a "
            "reward section, which trains one on the preferences"
        )
    scorers: dict[str, ScorerSettings | None] = {}
    if recipe.preferences is not None:
        scorers["preferences.scorer"] = recipe.preferences.scorer
    if scored or recipe.score.scorer is not None:
        scorers["score.scorer"] = recipe.scoring
    scorers["evaluate.scorer"] = recipe.evaluate.scorer
    for where, scorer in scorers.items():
        for stage in () if scorer is None else scorer.stages:
            if getattr(recipe, stage) is None:
                yield f"{where} names the stage {stage!r}, but the recipe has no {stage} section"
            if where == "preferences.scorer" and stage == "reward":
                yield "preferences.scorer cannot be this run's reward model, which is trained on those preferences"


def _evaluation_problems(recipe: Recipe) -> Iterator[str]:
    evaluate, data = recipe.evaluate, recipe.data
    usual = EvaluateSettings.model_fields["density_prompts"].default
    if evaluate.density_prompts > evaluate.pool_prompts and evaluate.density_prompts != usual:
        yield "evaluate.density_prompts is above evaluate.pool_prompts, whose samples it needs; raise the latter"
    if recipe.align and data.evaluation is None and data.preferences is None:
        yield "data.evaluation is missing: held-out prompts for the evidence"
    held_out = holds_out(recipe) or any(map(holds_out_rewards, recipe.align.values()))
    if data.held_out != DataSection.model_fields["held_out"].default and not held_out:
        why = "beside data.evaluation" if data.evaluation is not None else "without data.preferences"
        yield f"data.held_out has no effect {why}; remove it"


def holds_out(recipe: Recipe) -> bool:
    """Whether a part of the given preferences is kept from training, because nothing else is there to evaluate on."""
    return recipe.data.evaluation is None and recipe.data.preferences is not None


def holds_out_rewards(method: Method) -> bool:
    """Whether a part of the scored prompts is kept from a method's training, to say when it ends."""
    return method.stop_after is not None and method.trains_on == "rewards"


def _search_problems(recipe: Recipe) -> Iterator[str]:
    """A search that asks for what the recipe does not have or a setting does not allow, at any end of a range."""
    if recipe.search is None:
        if recipe.data.validation is not None:
            yield "data.validation has no effect without a search section"
        return
    if recipe.judging is None:
        yield "search ranks by reward: give evaluate.scorer, score.scorer or a reward section"
    if recipe.data.evaluation is None and recipe.data.validation is None:
        yield "search needs data.validation or data.evaluation: prompts that its trials are ranked on"
    alone = recipe.model_copy(update={"search": None, "data": recipe.data.model_copy(update={"validation": None})})
    for name, ranges in recipe.search.methods.items():
        where = f"search.methods.{name}"
        if name not in recipe.align:
            yield f"{where} is no method of this recipe; {nearest(name, recipe.align)}"
            continue
        method = recipe.align[name]
        if method.sweep is not None:
            yield f"{where} is a sweep; search with one value, and sweep with the settings found"
        if not ranges:
            yield f"{where} names no setting to search over"
        for setting, values in ranges.items():
            for problem in _range_problems(method, setting, values):
                yield f"{where}.{setting}{problem}"
                break
            else:
                for value in values.extremes:
                    other = {**recipe.align, name: changed(method, {setting: value})}
                    for problem in contradictions(alone.model_copy(update={"align": other})):
                        yield f"{where}.{setting} reaches {value!r}, but then {problem}"


def _range_problems(method: Method, name: str, values: Range) -> Iterator[str]:
    fields = type(method).model_fields
    fixed = _FIXED | dict.fromkeys(method.marked(NO_RESULT), "it changes no result")
    if name not in fields:
        yield f" is not a setting of the method; {nearest(name, fields)}"
    elif name in fixed:
        yield f" cannot be searched over: {fixed[name]}"
    elif values.choices is None and fields[name].annotation not in (int, float, float | None, int | None):
        yield " is not a number and has no low and high; give choices"
    else:
        for value in values.extremes:
            try:
                changed(method, {name: value})
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                yield f" reaches {value!r}, which the setting does not allow: {message[:1].lower() + message[1:]}"


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides (dotted keys, YAML values).

    Relative paths of local data and models are taken from the working directory, as in a shell.
    """
    path = Path(path)
    if data_suffix(path) is not None:
        raise InputError(
            f"{path} is data, and a recipe ends in .yaml; exalign align MODEL {path} aligns a model on it."
        )
    try:
        with path.open("rb") as stream:  # which may be no file at all, and have no end
            text = stream.read(4 * MAX_CHARACTERS + 1).decode("utf-8")
    except FileNotFoundError:
        if (RECIPES / f"{path.stem}.yaml").is_file():
            raise InputError(f"{path} does not exist; exalign recipes copy {path.stem} writes it here.") from None
        near = ", ".join(sorted(map(str, path.parent.glob("*.yaml")))[:8])
        raise InputError(f"{path} does not exist{'; there are ' + near if near else ''}.") from None
    except IsADirectoryError:
        instead = "it holds no recipe.yaml"
        if (path / "recipe.yaml").is_file():
            instead = f"of a run give its recipe: {path}/recipe.yaml --run {path}"
        raise InputError(f"{path} is a folder, and a recipe is a file: {instead}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start + 1}; save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)[:200]} cannot be read ({str(error)[:200]}).") from None
    values = parse_yaml(text, str(path))
    if values is None:
        raise InputError(f"{path} is empty; exalign recipe --explain shows what a recipe holds.")
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of settings, this is {type(values).__name__}.")
    return with_overrides(values, overrides, str(path))


def with_overrides(values: dict[str, Any], overrides: Iterable[str], where: str) -> Recipe:
    """The recipe of a mapping in which `key=value` overrides replace what it says."""
    values = copy.deepcopy(values)
    for override in overrides:
        _apply_override(values, override)
    return make_recipe(values, where)


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; every problem becomes one sentence."""
    # Keys that start with "x-" hold YAML anchors and are otherwise ignored.
    values = {key: value for key, value in values.items() if not str(key).startswith("x-")}
    if isinstance(values.get("align"), dict):  # a name without settings (align.exo=null) takes the method away
        values["align"] = {name: settings for name, settings in values["align"].items() if settings is not None}
    plain = plain_values(values, where)
    try:
        for name, settings in (plain.get("align") or {}).items() if isinstance(plain.get("align"), dict) else ():
            _check_method(str(name), settings, where)
        # Through JSON, where a YAML list may be a tuple but a string is never a number.
        return Recipe.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise InputError(f"{where}: {explain_validation_error(error, Recipe)}") from None


def _check_method(name: str, settings: Any, where: str) -> None:
    """The settings of a method on their own, whose class depends on them."""
    if not isinstance(settings, dict):
        return
    chosen = Method
    try:
        chosen = method_class(str(settings.get("method", "matching")))
        chosen.model_validate_json(json.dumps(settings))
    except ValidationError as error:
        raise InputError(f"{where}: {explain_validation_error(error, chosen, f'align.{name}')}") from None
    except InputError as error:
        known = loss_meaning(settings.get("method"))
        raise InputError(f"{where}: align.{name}.{error}" + (f" {known}." if known else "")) from None


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe: every setting that has a value, credentials in addresses blotted out."""
    return redact_values(json.loads(recipe.model_dump_json(exclude_none=True)))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override[:200]!r} is not KEY=VALUE, for example align.exo-rw.beta_pi=0.5.")
    target = values
    *parents, last = _steps(key.split("."), values)
    methods = values.get("align")
    if parents[:1] == ["align"] and len(parents) > 1 and isinstance(methods, dict) and parents[1] not in methods:
        new = f"a new method takes all at once, align.{parents[1]}={{...}}"
        raise InputError(f"{override[:200]!r}: align has no {parents[1]}; {nearest(parents[1], methods)} ({new})")
    if key.startswith("x-"):
        raise InputError(f"{override[:200]!r}: what x- holds is in its places by then; change it there.")
    for name in parents:
        if target.get(name) is None:
            target[name] = {}
        target = target[name]
        if not isinstance(target, dict):
            one = "a list, which is given whole" if isinstance(target, list) else "a single value"
            raise InputError(f"{override[:200]!r}: {name} is {one} and has no settings below it.")
    value = parse_yaml(text, key[:200])
    if value is None and parents == ["align"] and last not in target:
        raise InputError(f"{override[:200]!r}: align has no {last} to take away; {nearest(last, target)}")
    target[last] = value


def _steps(names: Sequence[str], values: Any) -> Iterator[str]:
    """Where a dotted key leads, name by name; a name with dots (of a method, a column) is one that is there."""
    while names:
        there = values if isinstance(values, dict) else {}
        length = next((n for n in range(len(names), 0, -1) if ".".join(names[:n]) in there), 1)
        step, names = ".".join(names[:length]), names[length:]
        yield step
        values = there.get(step)


_FORMS = {"DataSettings", "list[DataSettings]"}
"""How pydantic names, within a setting's place, the forms that it may have: no part of what was written."""


def explain_validation_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first problem of a pydantic error as a sentence with the dotted setting, then how many more there are."""
    other = {"model_type", "list_type"}  # of a place that may hold settings or a list of them
    found = error.errors()
    told = [problem for problem in found if problem["type"] not in other or problem["loc"][-1] not in _FORMS]
    told = told or found[:1]
    problems = sorted(told, key=lambda problem: problem["type"] != "extra_forbidden")
    first, more = _sentence(problems[0], model, prefix), len(problems) - 1
    return first + (f" ({more} more problem{'s' if more > 1 else ''})" if more else "")


def _sentence(problem: Any, model: type[BaseModel], prefix: str) -> str:
    location = [str(part) for part in problem["loc"] if part not in _FORMS]
    where = ".".join(filter(None, (prefix, *location))) or "recipe"
    if problem["type"] == "extra_forbidden":
        owner = settings_at(model, location[:-1])
        if (here := meaning(location[-1], problem["input"])) is not None:
            return f"{where} is not a setting; here: {here}."
        elsewhere, almost = ("", "") if prefix else (_elsewhere(location[-1]), _of_a_method(location[-1]))
        near = nearest(location[-1], owner.model_fields if owner else [], almost)
        return f"{where} is not a setting; {elsewhere or near}"
    if problem["type"] == "missing":
        return f"{where} is missing; it has no default."
    if problem["type"] == "value_error":
        return f"{'' if where == 'recipe' else where + ': '}{problem['ctx']['error']}."
    shown = "null" if problem["input"] is None else repr(problem["input"])
    text, hint = problem["msg"][:1].lower() + problem["msg"][1:], ""
    if problem["type"] == "model_type":
        text = "it takes settings, as name: value"
        hint = "; leave it out where its defaults will do" if problem["input"] is None else ""
    return f"{where}: {text}, not {shown if len(shown) < 60 else shown[:57] + '…'}{hint}."


def _elsewhere(name: str) -> str:
    """Where a setting of this very name stands, of a method first; empty where it stands nowhere."""
    if name in method_class("matching").model_fields:
        return f"it is a setting of a method, align.NAME.{name}."
    sections = {top: settings_at(Recipe, [top]) for top in Recipe.model_fields}
    place = next((top for top, section in sections.items() if section and name in section.model_fields), None)
    return f"it is {place}.{name}." if place else ""


def _of_a_method(name: str) -> str:
    """The setting of a method that this is nearly the name of, as a question; empty for none."""
    close = difflib.get_close_matches(name, method_class("matching").model_fields, n=1, cutoff=0.8)
    return f"did you mean a setting of a method, align.NAME.{close[0]}?" if close else ""


def settings_at(model: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    """The settings class that stands at a dotted location below `model`, through optional and mapped fields."""
    current: Any = model
    for part in location:
        if part.isdecimal():  # of a list; settings that may be a list stand for it already
            current = typing.get_args(current)[0] if typing.get_origin(current) in (list, tuple) else current
        elif is_settings(current):
            field = current.model_fields.get(part)
            current = field.annotation if field else None
        elif typing.get_origin(current) is dict:
            current = typing.get_args(current)[1]
        current = unwrap_optional(current)
    return current if is_settings(current) else None


def is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def unwrap_optional(annotation: Any) -> Any:
    """`X | None` → `X`, and the settings of `X | list[X]`; everything else as it is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        settings = [arg for arg in rest if is_settings(arg)]
        return rest[0] if len(rest) == 1 else settings[0] if settings else annotation
    return annotation
