"""`exalign plan`: what a recipe would cost, worked out before it is run: memory, tokens, operations, hours, what fits.

Nothing here measures: every number is a formula of the recipe, the architecture and the assumptions that are printed.
A stage is described by its `Work`, what is drawn, read and trained, each for a `Load` of prompts and completions; the
rest turns work into operations (`models.flops`, counted on torch's meta device), bytes on one device, and seconds:

* training: whole micro-batches go to devices, so a step takes ⌈micro-batches / devices⌉ of them in a row. What devices
  exchange is not in the seconds: it depends on links that a plan knows nothing about;
* sampling, scores, references: prompts are dealt out to the devices;
* seconds are operations over an assumed share of the device's peak, bytes follow from the architecture.

torch and transformers are imported where they are used: this module is loaded by every start of `exalign`.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from exalign.data.reading import DataSettings, each
from exalign.errors import InputError
from exalign.judging.options import with_settings
from exalign.models.model_settings import ModelSettings, adapter_base
from exalign.models.sizes import Architecture, completions_at_once, tokens_to_read, training_sizes
from exalign.rollout.settings import OneScorer, SampleSettings, ScorerSettings
from exalign.run.devices import Assumptions, Machine, find_device
from exalign.run.recipe import Recipe, load_recipe
from exalign.settings import Auto
from exalign.terminal import shown
from exalign.training.train_settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from exalign.data.batching import Group
    from exalign.methods.method import Method


@with_settings(Assumptions)
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe, for example recipes/imdb.yaml.")],
    settings: Assumptions,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change: align.exo-rw.epochs=2")
    ] = None,
    gpu: Annotated[str, typer.Option(help="A100-40, A100-80, H100, H200, L40S, RTX-4090, or cpu.")] = "H100",
    count: Annotated[int, typer.Option(min=1, help="Devices.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print values as JSON: seconds, bytes, operations.")] = False,
) -> None:
    """Work out what a recipe would cost before it is run: memory, tokens, operations, hours, and whether it fits."""
    loaded = load_recipe(recipe, overrides or ())
    machine = Machine(find_device(gpu, settings), count, settings)

    import transformers

    transformers.logging.set_verbosity_error()
    budget = budget_of(loaded, machine)
    if as_json:
        typer.echo(json.dumps(as_values(budget), indent=1))
    else:
        print_budget(budget, Console())


# ---- Models, without their weights

Kind = Literal["policy", "reward model", "classifier"]
_LABELS: dict[Kind, int | None] = {"policy": None, "reward model": 1, "classifier": 2}

_PYTHIA = {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240}
_QWEN = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "intermediate_size": 18944}
PUBLIC_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "gpt2-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "EleutherAI/pythia-2.8b": {**_PYTHIA, "model_type": "gpt_neox", "vocab_size": 50304, "tie_word_embeddings": False},
    "Qwen/Qwen2.5-7B-Instruct": {
        **_QWEN,
        "model_type": "qwen2",
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""The published configurations of the models that the shipped recipes name: a plan of them needs no hub."""


@lru_cache(maxsize=32)
def _architecture(settings_json: str, kind: Kind, vocabulary: int | None) -> Architecture:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from exalign.models.loading import with_lora

    settings = ModelSettings.model_validate_json(settings_json)
    config, origin = _configuration(settings, vocabulary)
    labels = _LABELS[kind]
    if labels is not None:
        config.num_labels = labels
    auto_class: Any = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in a way that will go
            model = auto_class.from_config(
                config, dtype=getattr(torch, settings.dtype), trust_remote_code=settings.trust_remote_code
            )
            model = with_lora(model, settings.lora, task="CAUSAL_LM" if labels is None else "SEQ_CLS")
    except (ValueError, TypeError) as error:
        raise InputError(f"No {kind} can be made of {settings.source or 'this config'} ({error}).") from None
    return Architecture(settings.source or str(config.model_type), model, origin)


def _configuration(settings: ModelSettings, vocabulary: int | None) -> tuple[PreTrainedConfig, str]:
    from transformers import AutoConfig

    if settings.source is None:
        values = dict(settings.config or {})
        if vocabulary is not None:
            values.setdefault("vocab_size", vocabulary)
        return _from_values(values), "the recipe's config"
    if settings.source.startswith("runs/") and not Path(settings.source).is_dir():
        raise InputError(
            f"There is no folder {settings.source} yet: carry out the run that makes it, then plan with it."
        )
    source = adapter_base(Path(settings.source)) or settings.source
    for local in (True, False):
        try:
            found = AutoConfig.from_pretrained(
                source, trust_remote_code=settings.trust_remote_code, local_files_only=local
            )
            return found, "its own configuration"
        except (OSError, ValueError, KeyError) as error:
            if source in PUBLIC_CONFIGURATIONS:  # without waiting for a hub that may not be reachable
                return _from_values(PUBLIC_CONFIGURATIONS[source]), "its published configuration, built in"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise InputError(
        f"The configuration of {source} cannot be read ({reason}); plan with a local folder of it, or with "
        f"one of {', '.join(PUBLIC_CONFIGURATIONS)}."
    )


def _from_values(values: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        rest = {name: value for name, value in values.items() if name != "model_type"}
        return AutoConfig.for_model(str(values.get("model_type")), **rest)
    except Exception as error:  # transformers raises many kinds here, all of them about the given values
        raise InputError(f"The model config is not valid ({str(error).splitlines()[0]}).") from error


def architecture_of(settings: ModelSettings, kind: Kind, vocabulary: int | None) -> Architecture:
    """The model that these settings load. `vocabulary` is the size of the tokenizer of a model from a config.

    A source whose configuration is neither readable nor built in, or a config that is not valid, is an `InputError`.
    """
    return _architecture(settings.model_dump_json(), kind, vocabulary if settings.source is None else None)


# ---- Prompts and completions

PUBLISHED_ROWS = {
    ("stanfordnlp/imdb", "train"): 25_000,
    ("stanfordnlp/imdb", "test"): 25_000,
    ("trl-lib/tldr", "train"): 116_722,
    ("trl-lib/tldr", "validation"): 6_447,
    ("trl-lib/tldr", "test"): 6_553,
    ("trl-lib/tldr-preference", "train"): 92_858,
    ("trl-lib/tldr-preference", "validation"): 86_086,
    ("Anthropic/hh-rlhf/helpful-base", "train"): 43_835,
    ("Anthropic/hh-rlhf/helpful-base", "test"): 2_354,
}
"""Rows of the data sets that the shipped recipes name, by hub name (with its folder) and split."""
UNKNOWN_ROWS = 10_000
"""Taken for a data set that is neither here nor in the table; the plan says so."""


@dataclass(frozen=True, slots=True)
class Load:
    """`prompts` groups of `completions` completions (K), all of the mean lengths; no group is over the longest ones."""

    prompts: int
    completions: int
    prompt_tokens: int
    completion_tokens: int
    longest_prompt: int
    longest_completion: int

    @property
    def tokens(self) -> int:
        """All of them, each prompt once."""
        return self.prompts * self.group_tokens

    @property
    def group_tokens(self) -> int:
        return self.prompt_tokens + self.completions * self.completion_tokens

    @property
    def longest_group(self) -> int:
        return self.longest_prompt + self.completions * self.longest_completion

    def group(self) -> Group:
        """One group of the mean lengths, whose ids mean nothing: what `models.flops` counts."""
        import torch

        from exalign.data.batching import Group

        completion = torch.zeros(self.completion_tokens, dtype=torch.long)
        return Group(0, torch.zeros(self.prompt_tokens, dtype=torch.long), (completion,) * self.completions)


@dataclass
class Loads:
    """The loads of a recipe's stages; `said` collects what had to be assumed, each sentence once."""

    recipe: Recipe
    assumed: Assumptions
    said: dict[str, None] = field(default_factory=dict)
    _known: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # each file is read once

    def supervised(self) -> Load:
        """Texts, K = 1: of data.sft, or the preferred completions of the preferences."""
        load = self.given("sft" if self.recipe.data.sft is not None else "preferences", 1)
        if self.recipe.sft is None or not self.recipe.sft.train_on_prompts:
            return load
        whole, longest = load.group_tokens - 1, load.longest_group - 1  # every token but the first is a target
        return replace(load, prompt_tokens=1, completion_tokens=whole, longest_prompt=1, longest_completion=longest)

    def labelled(self, longest: int) -> Load:
        """Labelled texts, of which a classifier reads `longest` tokens at most."""
        load = self.given("labelled", 1)
        completion = min(self.assumed.completion_tokens or max(1, longest // 2), longest)
        short = replace(load, longest_prompt=min(load.longest_prompt, longest))
        return replace(short, completion_tokens=completion, longest_completion=longest)

    def pairs(self) -> Load:
        """The preferences: given, or two samples of the supervised model for each prompt."""
        return self.given("preferences", 2) if self.recipe.data.preferences is not None else self.sampled(2)

    def rewarded(self) -> Load:
        """What has rewards: given, or sampled and scored. Given rows are taken to have as many completions."""
        completions = self.recipe.sample.num_completions
        return self.given("rewards", completions) if self.recipe.data.rewards is not None else self.sampled(completions)

    def given(self, name: str, completions: int) -> Load:
        """Rows of `data.NAME` with their completions."""
        return self._load(name, completions, self.recipe.data.max_completion_tokens)

    def sampled(self, completions: int) -> Load:
        """Samples for the prompts of the recipe."""
        name = "prompts" if self.recipe.data.prompts else "preferences"
        return self._load(name, completions, self.recipe.sample.max_new_tokens)

    def evaluation(self, prompts: int, samples: int) -> Load:
        """Samples for evaluation prompts, of which there may be fewer."""
        name = "evaluation" if self.recipe.data.evaluation is not None else "preferences"
        load = self._load(name, samples, self.recipe.sample.max_new_tokens)
        return replace(load, prompts=min(prompts, load.prompts))

    def _load(self, name: str, completions: int, longest: int) -> Load:
        sources = each(getattr(self.recipe.data, name))
        longest_prompt, given = self.recipe.data.max_prompt_tokens, self.assumed.prompt_tokens
        if given is not None and given > longest_prompt:
            raise InputError(f"--prompt-tokens {given} is above data.max_prompt_tokens = {longest_prompt}; lower it.")
        prompt = given or min(sources[0].prompt_tokens or max(1, longest_prompt // 2), longest_prompt)
        completion = min(self.assumed.completion_tokens or max(1, longest // 2), longest)
        return Load(self._rows(sources, name), completions, prompt, completion, longest_prompt, longest)

    def _rows(self, sources: list[DataSettings], name: str) -> int:
        if self.assumed.prompts is not None and name != "evaluation":
            found = [(self.assumed.prompts, "--prompts")]
        else:
            found = self._known[name] = self._known.get(name) or [rows_of(source) for source in sources]
        for rows, how in found:
            self.said[f"data.{name}: {rows:,} rows ({how})"] = None
        return sum(rows for rows, _ in found)


def rows_of(source: DataSettings) -> tuple[int, str]:
    """How many rows a source has after `skip` and `limit`, and how that is known. Local data is read to its end."""
    from exalign.data.reading import read_source

    if Path(source.source).expanduser().exists():
        counted = sum(1 for _ in read_source(source.model_copy(update={"prompt_tokens": None}), Counter()))
        return counted, f"counted in {source.source}"
    published = "/".join(filter(None, (source.source, source.data_dir)))
    if (rows := PUBLISHED_ROWS.get((published, source.split or "train"))) is not None:
        left = round(source.share * max(0, rows - source.skip))
        return min(left, source.limit or left), f"published size of {published}"
    if source.limit is not None:
        return source.limit, f"limit; {source.source} is not here to be counted"
    return UNKNOWN_ROWS, f"assumed, {source.source} is not here to be counted: give --prompts"


# ---- Bytes on one device


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what they are for; `copies` are autocast's, `exchange` what several devices need to work together."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    copies: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


def training_state(model: Architecture) -> Memory:
    """Weights, gradients and AdamW's two moments, each of the type of the weight it belongs to."""
    return Memory(weights=model.weight_bytes, gradients=model.trained_bytes, optimizer=2 * model.trained_bytes)


def training_memory(part: Train, machine: Machine) -> Memory:
    """One of the devices that train these models together; from two on, buckets of the gradients' size (DDP)."""
    models, settings, load, count = part.models, part.settings, part.load, machine.count
    budget, checkpointed = part.sizes(machine)
    whole_step = min(settings.batch_prompts, load.prompts) * load.longest_group
    tokens = min(max(budget, load.longest_group), whole_step)  # of the fullest micro-batch
    whole = Memory()
    half = settings.precision == "bf16"
    for model in models:
        copies = model.half_copies if half else 0
        activations = tokens * model.training_activations(autocast=half, checkpointed=checkpointed)
        activations += model.head_activations(tokens, machine.sizing)
        buckets = model.trained_bytes if count > 1 else 0
        whole += replace(training_state(model), copies=copies, activations=activations, exchange=buckets)
    return whole


def sharded_memory(memory: Memory, models: Sequence[Architecture], settings: TrainSettings, count: int) -> Memory:
    """The same under a full shard (FSDP2) over `count` devices.

    Gathered at a time: the embeddings and the head, the block that works and the one that comes next, in the type of
    the products, and the gradient of the largest of these before it is scattered.
    """
    exchange = 0.0
    for model in models:
        factor = 0.5 if settings.precision == "bf16" and model.element_size == 4 else 1.0
        root = model.weight_bytes - model.layers * model.layer_bytes
        trained_share = model.trained_bytes / model.weight_bytes
        exchange += factor * (root + 2 * model.layer_bytes) + max(root, model.layer_bytes) * trained_share
    divided = {name: getattr(memory, name) / count for name in ("weights", "gradients", "optimizer")}
    return replace(memory, **divided, copies=0.0, exchange=exchange)  # what is gathered has the products' type


def inference_memory(model: Architecture, tokens: int, sizing: float | None) -> Memory:
    """One device that computes `tokens` tokens at a time without gradients."""
    activations = tokens * model.reading_activations() + 2 * model.head_activations(tokens, sizing, kept=False)
    return Memory(weights=model.weight_bytes, activations=activations)


_FIRST_CAPACITY, _ENTERING_TOKENS = 32, 2048  # the sampler's: rows of a new cache, and prompt tokens read in one step


def sampling_memory(model: Architecture, load: Load, batch_completions: int, sizing: float | None) -> Memory:
    """One device that samples: weights, the cache of all groups in flight at their longest, and the logits of a step.

    A prompt's keys and values are kept once per group, a completion's in rows that grow by doubling from 32.
    """
    groups = max(1, min(batch_completions // load.completions, load.prompts))  # whole ones, at least one
    rows = groups * load.completions
    logits = rows * model.vocabulary * (4 + model.element_size)
    working = inference_memory(model, max(_ENTERING_TOKENS, load.longest_prompt) + rows, sizing)
    cache = float(groups * cache_tokens(load) * model.cache_bytes_per_token)
    return replace(working, cache=cache, activations=working.activations + logits)


def cache_tokens(load: Load) -> int:
    """Tokens for which one group's cache has room when its completions are as long as they may be.

    The last token of a completion is never read, so T − 1 are cached.
    """
    room, read = _FIRST_CAPACITY, load.longest_completion - 1
    while room < read:
        room *= 2
    return load.longest_prompt + (load.completions * room if read else 0)


# ---- The work of a stage, and its cost


@dataclass(frozen=True)
class Draw:
    """K completions for each prompt of `load`, of which `together` prompts (None: all) are at hand at a time."""

    model: Architecture
    load: Load
    settings: SampleSettings
    together: int | None = None


@dataclass(frozen=True)
class Read:
    """Groups computed without gradients: scores, and log-probabilities of a policy. `bf16` is autocast."""

    model: Architecture
    load: Load
    token_budget: int | Auto | None = "auto"
    precision: str = "fp32"


@dataclass(frozen=True)
class Train:
    """`models` trained together on every group, `passes` times."""

    models: Sequence[Architecture]
    settings: TrainSettings
    load: Load
    passes: int

    def sizes(self, machine: Machine) -> tuple[int, bool]:
        """The token budget, and whether activations are recomputed."""
        settings = self.settings
        return training_sizes(
            self.models,
            machine.sizing,
            token_budget=settings.token_budget,
            checkpointing=settings.gradient_checkpointing,
            autocast=settings.precision == "bf16",
        )


@dataclass(frozen=True)
class Work:
    """What a stage computes, part after part, `times`; 0: a search before it has done so.

    `on_one_device`: its models stand side by side on a device, and `beside` are those that are only read there.
    """

    parts: tuple[Draw | Read | Train | Work, ...]
    times: int = 1
    on_one_device: bool = False
    beside: tuple[Architecture, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """A stage, or a part of one. `tokens` counts each prompt once; `stored` are bytes of models and checkpoints.

    `replicated` is the memory of a device that holds everything, `sharded` that of one under a full shard (training on
    all devices only). `bound`: `operations`, `batch` where a step has fewer micro-batches than devices, or `search`.
    """

    stage: str
    parameters: int
    trained: int
    tokens: int
    flops: float
    seconds: float
    bound: str
    replicated: Memory
    sharded: Memory | None = None
    stored: float = 0.0

    def fits(self, usable: float) -> str:
        """`yes`, `sharded` where only a full shard fits, or `no`."""
        if self.replicated.total <= usable:
            return "yes"
        return "sharded" if self.sharded is not None and self.sharded.total <= usable else "no"


def cost_of(stage: str, work: Work, machine: Machine) -> Cost:
    """The parts of a stage follow one another; the longest gives its bound, the fullest its memory."""
    alone = replace(machine, count=1) if work.on_one_device else machine
    parts = [_PRICE[type(part)](part, alone) for part in work.parts]
    fullest = max(parts, key=lambda part: part.replicated.total)
    return Cost(
        stage,
        parts[0].parameters,
        max(part.trained for part in parts),
        work.times * sum(part.tokens for part in parts),
        work.times * sum(part.flops for part in parts),
        work.times * sum(part.seconds for part in parts),
        max(parts, key=lambda part: part.seconds).bound if work.times else "search",
        _side_by_side(work, parts) if work.on_one_device else fullest.replicated,
        None if work.on_one_device else fullest.sharded,
        sum(part.stored for part in parts),  # each of several trainings writes over the one before it
    )


def _side_by_side(work: Work, parts: Sequence[Cost]) -> Memory:
    """Training or drawing, whichever needs more. Gradients are gone while completions are drawn, moments are not."""
    memory = {type(part): cost.replicated for part, cost in zip(work.parts, parts, strict=True)}
    drawing = replace(memory[Draw], weights=memory[Train].weights, optimizer=memory[Train].optimizer)
    largest = max(memory[Train], drawing, key=lambda one: one.total)
    return largest + Memory(weights=sum(model.weight_bytes for model in work.beside))


def _train_cost(part: Train, machine: Machine) -> Cost:
    from exalign.models.flops import forward_flops, training_flops

    models, settings, load, group = part.models, part.settings, part.load, [part.load.group()]
    groups, trained = part.passes * load.prompts, sum(model.trained_bytes for model in models)
    necessary = groups * sum(training_flops(model.module, group) for model in models)
    budget, checkpointed = part.sizes(machine)
    again = checkpointed * groups * sum(forward_flops(model.module, group) for model in models)
    in_budget = max(1, budget // load.group_tokens)
    micro = -(-min(settings.batch_prompts, load.prompts) // in_budget)  # of a step: what devices can share
    policies = min(settings.save_policies, part.passes * -(-load.prompts // settings.batch_prompts)) + 1
    whole = training_memory(part, machine)
    return Cost(
        "",
        sum(model.parameters for model in models),
        sum(model.trained for model in models),
        part.passes * load.tokens,
        necessary,
        (necessary + again) * -(-micro // machine.count) / micro / machine.rate(settings.precision),
        "batch" if micro < machine.count else "operations",
        whole,
        sharded_memory(whole, models, settings, machine.count),
        # The checkpoint under way is written beside the last.
        float(policies * models[0].weight_bytes + 2 * (models[0].weight_bytes + 2 * trained)),
    )


def _read_cost(part: Read, machine: Machine) -> Cost:
    half, load = part.precision == "bf16", part.load
    if not part.model.shares_prompts:
        load = replace(load, prompts=load.prompts * load.completions, completions=1)
    budget = tokens_to_read([part.model], machine.sizing, part.token_budget)
    memory = inference_memory(part.model, max(budget, load.longest_group), machine.sizing)
    memory = replace(memory, copies=part.model.half_copies if half else 0.0)
    return _dealt_out(part.model, load, machine, machine.rate("bf16" if half else part.model.precision), memory)


def _draw_cost(part: Draw, machine: Machine) -> Cost:
    from exalign.run.materials import SHARD

    share = -(-part.load.prompts // min(machine.count, part.load.prompts))  # of the device that has most
    at_hand = replace(part.load, prompts=min(share, SHARD, part.together or SHARD))
    together = completions_at_once(
        [part.model],
        machine.sizing,
        part.settings.batch_completions,
        prompt_tokens=at_hand.longest_prompt / at_hand.completions,
        tokens=at_hand.longest_completion,
    )
    memory = sampling_memory(part.model, at_hand, together, machine.sizing)
    return _dealt_out(part.model, part.load, machine, machine.rate(part.model.precision, sampling=True), memory)


def _dealt_out(model: Architecture, load: Load, machine: Machine, rate: float, memory: Memory) -> Cost:
    from exalign.models.flops import forward_flops

    flops = load.prompts * forward_flops(model.module, [load.group()])
    seconds = flops / rate / min(machine.count, load.prompts)
    return Cost("", model.parameters, 0, load.tokens, flops, seconds, "operations", memory)


_PRICE: dict[type, Callable[[Any, Machine], Cost]] = {
    Draw: _draw_cost,
    Read: _read_cost,
    Train: _train_cost,
    Work: lambda work, machine: cost_of("", work, machine),
}


# ---- The stages of a recipe


class Planner:
    """The work of every stage of a recipe. `said` are the assumptions that it called for, as sentences."""

    def __init__(self, recipe: Recipe, assumed: Assumptions) -> None:
        self.recipe = recipe
        self.loads = Loads(recipe, assumed)
        self.said: dict[str, None] = {}

    def work(self, stage: str) -> Work | None:
        """The work of a stage, which one function for each kind knows; None where it computes with no model."""
        kind, _, rest = stage.partition("/")
        known = getattr(self, f"_{kind}", None)
        return None if known is None else known(rest)

    def _sft(self, _: str) -> Work:
        assert self.recipe.sft is not None
        return self._trained(self.policy(), self.recipe.sft, self.loads.supervised())

    def _oracle(self, _: str) -> Work:
        oracle = self.recipe.oracle
        assert oracle is not None
        return self._trained(self.model(oracle.model, "classifier"), oracle, self.loads.labelled(oracle.max_tokens))

    def _reward(self, _: str) -> Work:
        settings = self.recipe.reward
        assert settings is not None
        model = self.model(settings.model or self.recipe.model, "reward model")
        return self._trained(model, settings, self.loads.pairs())

    @staticmethod
    def _trained(model: Architecture, settings: TrainSettings, load: Load) -> Work:
        return Work((Train([model], settings, load, settings.epochs),))

    def _preferences(self, _: str) -> Work | None:
        settings = self.recipe.preferences
        return None if settings is None else self._drawn(self.loads.sampled(2), settings.scorer)

    def _rollouts(self, _: str) -> Work:
        return Work((Draw(self.supervised(), self.loads.rewarded(), self.recipe.sample),))

    def _scored(self, _: str) -> Work | None:
        if self.recipe.data.rewards is not None:
            return None
        load = self.loads.rewarded()
        scores = tuple(Read(scorer, load) for scorer in self.scorers(self.recipe.scoring))
        return Work(scores) if scores else None

    def _reference(self, rest: str) -> Work:
        """log π_sft of what methods align on that share it: by their target and precision."""
        from exalign.run.stages import reference_of

        name = next(n for n, method in self.recipe.align.items() if reference_of(method) == f"reference/{rest}")
        method = self.recipe.align[name]
        return Work((Read(self.supervised(), self.load_of(method), method.token_budget, method.precision),))

    def _align(self, name: str) -> Work | None:
        """The method's training, which is done where a search comes before it."""
        if self.recipe.align[name].given:
            return None
        searched = self.recipe.search is not None and name in self.recipe.search.methods
        return replace(self.method(name), times=0 if searched else 1)

    def _search(self, name: str) -> Work:
        """Every trial: trained as the recipe's own settings train, and what it saves tried on validation prompts."""
        assert self.recipe.search is not None
        tried = self._validation("").parts * self.policies(name)
        return Work((self.method(name), *tried), times=self.recipe.search.trials)

    def method(self, name: str) -> Work:
        """A method's training; where it samples for itself, also the drawing, the scores, and what its models say."""
        settings = self.recipe.align[name]
        load, amount = self.load_of(settings), settings.amount
        times = 1 if settings.swept is None else len(settings.swept[1])
        policies = [self.policy()]
        if amount.critic is not None:
            critic = self.recipe.model if amount.critic == "policy" else amount.critic
            policies.append(self.model(critic, "reward model"))
        trained = Train(policies, settings, load, times * amount.passes)
        if settings.trains_on != "prompts":
            again = replace(load, prompts=load.prompts * times * amount.reads)
            read = (Read(policies[0], again, settings.token_budget, settings.precision),) if amount.reads else ()
            return Work((trained, *read))
        reference, scorers = self.supervised(), self.scorers(self.recipe.scoring)
        every = replace(load, prompts=load.prompts * times * amount.draws)
        reading = [reference, *(policies if amount.critic is not None else [])]
        return Work(
            (
                trained,
                Draw(reference, every, self.recipe.sample, amount.together),
                *(Read(model, every, settings.token_budget, settings.precision) for model in reading),
                *(Read(scorer, every) for scorer in scorers),
            ),
            on_one_device=True,
            beside=(reference, *scorers),
        )

    def _validation(self, _: str) -> Work:
        search = self.recipe.search
        assert search is not None
        return self._drawn(self.loads.evaluation(search.prompts, search.samples), self.recipe.judging, reference=True)

    def _evaluation(self, rest: str) -> Work | None:
        """Samples of π_sft, its pool, or of every policy that a method saved: drawn, scored, and log π_sft of them.

        For density ratios π_sft and a method's last policy read the pool's samples of a few prompts; held-out pairs are
        read by π_sft and by every policy saved.
        """
        settings, (what, _, name) = self.recipe.evaluate, rest.partition("/")
        pool = self.loads.evaluation(min(settings.pool_prompts, settings.prompts), settings.pool_samples)
        if what == "prompts":
            return None
        if what == "pool":
            return self._drawn(pool, self.recipe.judging)
        if what == "density":
            few = replace(pool, prompts=min(pool.prompts, settings.density_prompts))
            return Work((Read(self.supervised(), few, None),), times=2)
        if what == "pairs":
            pairs = Read(self.supervised(), self.loads.evaluation(settings.prompts, 2), None)
            return Work((pairs,), times=self.policies(name) if name else 1)
        load, answers = self.loads.evaluation(settings.prompts, settings.samples), what == "answers"
        once = self._drawn(load, self.recipe.judging, reference=not answers)
        whose = name if answers else what
        return once if whose == "sft" else replace(once, times=self.policies(whose))

    def _drawn(self, load: Load, settings: ScorerSettings | None, *, reference: bool = False) -> Work:
        """Samples for a load, their rewards, and log π_sft of them."""
        policy = self.supervised()
        scores = [Read(scorer, load) for scorer in self.scorers(settings)]
        read = [Read(policy, load, None)] if reference else []
        return Work((Draw(policy, load, self.recipe.sample), *scores, *read))

    def load_of(self, method: Method) -> Load:
        if method.trains_on == "prompts":
            return self.loads.sampled(self.recipe.sample.num_completions)
        return self.loads.pairs() if method.trains_on == "preferences" else self.loads.rewarded()

    def policies(self, name: str) -> int:
        """How many policies a method saves."""
        from exalign.training.batches import saved_steps

        method = self.recipe.align[name]
        if several := method.given or (method.swept or ("", ()))[1]:
            return len(several)
        steps = method.amount.passes * -(-self.load_of(method).prompts // method.batch_prompts)
        return len(saved_steps(steps, method.save_policies, idle=method.idle_steps))

    def scorers(self, settings: ScorerSettings | None) -> list[Architecture]:
        """The models behind a scorer, or behind each part of a sum."""
        if settings is None:
            return []
        return [model for part in settings.sum or (settings,) if (model := self._scorer(part)) is not None]

    def _scorer(self, settings: OneScorer) -> Architecture | None:
        """The model behind a scorer, as it is loaded: adapters merged, in float32; a function has none."""
        recipe = self.recipe
        if settings.function is not None:
            self.said[f"{settings.function} costs nothing"] = None
            return None
        loaded = {"lora": None, "dtype": "float32"}
        if settings.stage == "reward":
            assert recipe.reward is not None
            return self.model((recipe.reward.model or recipe.model).model_copy(update=loaded), "reward model")
        if settings.stage == "oracle":
            assert recipe.oracle is not None
            return self.model(recipe.oracle.model.model_copy(update=loaded), "classifier")
        source = settings.reward_model or settings.classifier
        return self.model(ModelSettings(source=source), "reward model" if settings.reward_model else "classifier")

    def policy(self) -> Architecture:
        return self.model(self.recipe.model, "policy")

    def supervised(self) -> Architecture:
        """π_sft, its adapters merged, in the type of the recipe's model."""
        return self.model(self.recipe.model.model_copy(update={"lora": None}), "policy")

    def model(self, settings: ModelSettings, kind: Kind) -> Architecture:
        found = architecture_of(settings, kind, self._vocabulary() if settings.source is None else None)
        adapters = "" if settings.lora is None else f" with adapters, of which {found.trained:,} are trained,"
        self.said[f"{kind}: {found.name}, {found.parameters:,} parameters{adapters or ','} from {found.origin}"] = None
        return found

    def _vocabulary(self) -> int | None:
        """The size of the run's tokenizer, for models from a config; None where it is not here yet."""
        from exalign.models.loading import load_tokenizer

        tokenizer = self.recipe.tokenizer
        if tokenizer.vocab_size is not None:
            return tokenizer.vocab_size
        if tokenizer.source is not None and Path(tokenizer.source).is_dir():
            return len(load_tokenizer(tokenizer.source))
        if tokenizer.source is not None:
            self.said[f"{tokenizer.source} is not here: the vocabulary is that of the model's kind"] = None
        return None


@dataclass(frozen=True)
class Budget:
    """A recipe's costs on a machine. `said` are the assumptions that this recipe called for, as sentences."""

    recipe: Recipe
    machine: Machine
    costs: tuple[Cost, ...]
    said: tuple[str, ...]

    def total(self, name: Literal["tokens", "flops", "seconds", "stored"]) -> float:
        """Of all stages, one after the other."""
        return sum(getattr(cost, name) for cost in self.costs)


def budget_of(recipe: Recipe, machine: Machine) -> Budget:
    """The costs of all stages that compute with a model, and what was assumed about data and models."""
    from exalign.run.stages import plan as stages_of

    planner = Planner(recipe, machine.assumed)
    works = [(stage.name, work) for stage in stages_of(recipe) if (work := planner.work(stage.name)) is not None]
    costs = tuple(cost_of(name, work, machine) for name, work in works)
    return Budget(recipe, machine, costs, (*planner.loads.said, *planner.said))


# ---- Printing

_FITS = {"yes": "[green]yes[/]", "sharded": "[yellow]sharded[/]", "no": "[bold red]no[/]"}


def print_budget(budget: Budget, console: Console) -> None:
    """Work and hours, memory by what it is for, the totals, and every assumption."""
    machine = budget.machine
    about = f" on {machine.count} × {machine.device.name}. Nothing here was measured: every number follows from the "
    about += "recipe, formulas and the assumptions below."
    console.print(Text.assemble(shown(budget.recipe.name, "bold"), about))
    console.print(_table(budget))
    console.print("[bold]Assumed[/]")
    for sentence in assumptions(budget):
        console.print(Text.assemble("  • ", shown(sentence)))


def _table(budget: Budget) -> Table:
    """A row for each stage, and the totals of stages that follow one another. GB of memory are those of one device."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 0))
    for name in ("stage", "tokens", "PFLOP", "time", "bound", "GB", "sharded", "fits", "disk"):
        table.add_column(name, justify="left" if name in ("stage", "bound") else "right", no_wrap=True)
    for cost in budget.costs:
        memory = (_gigabytes(cost.replicated.total), _gigabytes(cost.sharded.total) if cost.sharded else "–")
        table.add_row(
            shown(cost.stage),
            quantity(cost.tokens),
            _petaflop(cost.flops),
            duration(cost.seconds),
            "" if cost.bound == "operations" else cost.bound,
            *memory,
            _FITS[cost.fits(budget.machine.usable)],
            _gigabytes(cost.stored),
        )
    table.add_section()
    tokens, flops, seconds = (budget.total(name) for name in ("tokens", "flops", "seconds"))
    done = (quantity(tokens), _petaflop(flops), duration(seconds), "", "", "", "")
    table.add_row("all", *done, _gigabytes(budget.total("stored")))
    return table


def assumptions(budget: Budget) -> list[str]:
    """Every assumption as a sentence: the device's specification, the shares, the lengths, the data and the models."""
    device, assumed = budget.machine.device, budget.machine.assumed
    prompt = assumed.prompt_tokens or "half the longest, or data.*.prompt_tokens where set"
    return [
        f"{device.name}: {device.memory / 1e9:,.0f} GB, dense products {device.bf16 / 1e12:,.3g} TFLOP/s in bf16 and "
        f"{device.fp32 / 1e12:,.3g} in fp32 ({device.specification})",
        f"{assumed.training_share:.0%} of that rate for necessary work (--training-share), "
        f"{assumed.sampling_share:.0%} in sampling (--sampling-share), {assumed.memory_share:.0%} of the memory "
        "(--memory-share); what devices exchange is not in the time",
        f"tokens: mean prompt {prompt}; mean completion {assumed.completion_tokens or 'half the longest'} "
        "(--prompt-tokens, --completion-tokens). Memory is for the longest",
        "GB: of one device, then of one under a full shard in the manner of FSDP2; disk: GB of models and checkpoints",
        "bound by operations, or: batch, with fewer micro-batches than devices; search, which has done it",
        "methods that sample while they train: one device",
        *budget.said,
    ]


def as_values(budget: Budget) -> dict[str, Any]:
    """The same in seconds, bytes and operations, for JSON."""

    usable = budget.machine.usable
    return {
        "recipe": budget.recipe.name,
        "device": asdict(budget.machine.device),
        "count": budget.machine.count,
        "assumed": budget.machine.assumed.model_dump(),
        "said": assumptions(budget),
        "usable_bytes": usable,
        "stages": [{**asdict(cost), "fits": cost.fits(usable)} for cost in budget.costs],
        "total": {name: budget.total(name) for name in ("tokens", "flops", "seconds", "stored")},
    }


def quantity(number: float) -> str:
    """A count in at most five characters.

    >>> quantity(950), quantity(124_439_808), quantity(7_615_616_512), quantity(4e13)
    ('950', '124M', '7.62B', '40T')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """Hours, below one hour minutes, below one minute seconds.

    >>> duration(7.25), duration(150), duration(5400), duration(3.6e6)
    ('7.2 s', '2.5 min', '1.5 h', '1,000 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.2g} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def _gigabytes(size: float) -> str:
    """One decimal below 1,000; a dash for nothing."""
    gigabytes = size / 1e9
    return "–" if not size else "<0.1" if gigabytes < 0.05 else f"{gigabytes:,.{1 if gigabytes < 1000 else 0}f}"


def _petaflop(flops: float) -> str:
    petaflop = flops / 1e15
    return "<0.01" if petaflop < 0.01 else f"{petaflop:.3g}" if petaflop < 1000 else f"{petaflop:,.0f}"
