"""`exalign plan`: what a recipe would cost, worked out before it is run: memory, tokens, operations, hours, what fits.

Nothing here measures: every number is a formula of the recipe, the architecture and the assumptions that are printed.
A stage draws, reads and trains, each for a `Load` of prompts and completions, and each is a `Cost`: operations
(`models.flops`, counted on torch's meta device), bytes on one device, and seconds.

* training: whole micro-batches go to devices, so a step takes ⌈micro-batches / devices⌉ of them in a row. What devices
  exchange is not in the seconds: it depends on links that a plan knows nothing about;
* sampling, scores, references: prompts are dealt out to the devices;
* seconds are operations over an assumed share of the device's peak, bytes follow from the architecture.

torch and transformers are imported where they are used: this module is loaded by every start of `exalign`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from exalign.data.reading import DataSettings, each, named, prompt_digest, read_source, whole
from exalign.errors import InputError, nearest
from exalign.judging.options import with_settings
from exalign.models.model_settings import ModelSettings, adapter_base
from exalign.models.sizes import Architecture, completions_at_once, tokens_to_read, training_sizes
from exalign.rollout.settings import OneScorer, SampleSettings, ScorerSettings
from exalign.run.recipe import Recipe, holds_out, load_recipe
from exalign.settings import Auto, Settings
from exalign.storage import exists
from exalign.terminal import shown
from exalign.training.train_settings import TrainSettings

if TYPE_CHECKING:
    from exalign.data.batching import Group
    from exalign.methods.method import Method


class Assumptions(Settings):
    """Lengths and sizes that the recipe does not know, and how much of a device's limits is reached.

    Lengths are means. Memory is reserved for the recipe's maxima, time is spent on the means.
    """

    prompt_tokens: int | None = Field(
        None, gt=0, description="mean tokens of a prompt; default: data.*.prompt_tokens, else half of max_prompt_tokens"
    )
    completion_tokens: int | None = Field(
        None, gt=0, description="mean tokens of a completion; default: half of the longest that is allowed"
    )
    prompts: int | None = Field(
        None, gt=0, description="rows of every data set but data.evaluation; default: counted, or the published size"
    )
    training_share: float = Field(
        0.4, gt=0, le=1, description="share of the device's peak that necessary work reaches in training and scoring"
    )
    sampling_share: float = Field(
        0.1, gt=0, le=1, description="the same in sampling, whose steps are small; exalign bench measures both"
    )
    memory_share: float = Field(
        0.9, gt=0, le=1, description="share of the memory that tensors may take; the rest is context and fragments"
    )
    gflops: float | None = Field(None, gt=0, description="cpu only: peak GFLOP/s of matrix products (exalign bench)")
    memory: float | None = Field(None, gt=0, description="cpu only: GB of memory; default: this machine's")


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
    machine = find_machine(gpu, count, settings)

    import transformers

    transformers.logging.set_verbosity_error()
    budget = Budget(loaded, machine)
    if as_json:
        typer.echo(json.dumps(as_values(budget), indent=1))
    else:
        print_budget(budget, Console())


# ---- Devices


@dataclass(frozen=True, slots=True)
class Machine:
    """`count` equal devices, and what is assumed about them. `memory` of one in bytes; `bf16` and `fp32` are its dense
    matrix products in operations/s, summed in float32. `fp32` is without TF32, as torch multiplies unless told
    otherwise."""

    name: str
    memory: float
    bf16: float
    fp32: float
    specification: str
    count: int
    assumed: Assumptions

    @property
    def usable(self) -> float:
        """Bytes of one device that tensors may take."""
        return self.memory * self.assumed.memory_share

    @property
    def sizing(self) -> float | None:
        """Bytes that sizes left to choose follow from; None for a CPU (`models.sizes`)."""
        return None if self.name == "cpu" else self.memory

    def rate(self, precision: str, *, sampling: bool = False) -> float:
        """Operations per second of necessary work that a device is assumed to do in `fp32` or `bf16`."""
        share = self.assumed.sampling_share if sampling else self.assumed.training_share
        return (self.bf16 if precision == "bf16" else self.fp32) * share


GPUS = {
    "A100-40": (40, 312, 19.5, "NVIDIA A100 datasheet, SXM4 40 GB"),
    "A100-80": (80, 312, 19.5, "NVIDIA A100 datasheet, SXM4 80 GB"),
    "H100": (80, 989, 67, "NVIDIA H100 datasheet, SXM5 80 GB (1,979 with sparsity, halved)"),
    "H200": (141, 989, 67, "NVIDIA H200 datasheet, SXM5 141 GB (1,979 with sparsity, halved)"),
    "L40S": (48, 362, 91.6, "NVIDIA L40S datasheet"),
    "RTX-4090": (24, 165.2, 82.6, "NVIDIA Ada GPU architecture whitepaper, RTX 4090"),
}
"""By name: GB, TFLOP/s in bf16 and in fp32, and where this is published."""


def find_machine(name: str, count: int, assumed: Assumptions) -> Machine:
    """`count` devices of this name, in any case; `cpu` has the rate `assumed.gflops`.

    An unknown name, a cpu without a rate, or a cpu's numbers given for another device, is an `InputError`.
    """
    name = {known.lower(): known for known in (*GPUS, "cpu")}.get(name.lower(), name)
    if name == "cpu":
        if assumed.gflops is None:
            raise InputError(
                "--gpu cpu needs --gflops, the peak of its matrix products; `exalign bench MODEL` measures it."
            )
        here, rate = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), assumed.gflops * 1e9
        memory = float(here) if assumed.memory is None else assumed.memory * 1e9
        return Machine("cpu", memory, rate, rate, "--gflops, --memory", count, assumed)
    if name not in GPUS:
        raise InputError(f"--gpu {name} is not a device whose specification is known; {nearest(name, [*GPUS, 'cpu'])}")
    for option in ("gflops", "memory"):
        if getattr(assumed, option) is not None:
            raise InputError(f"--{option} is that of a cpu, and {name} has its own; remove it, or give --gpu cpu.")
    gigabytes, bf16, fp32, source = GPUS[name]
    return Machine(name, gigabytes * 1e9, bf16 * 1e12, fp32 * 1e12, source, count, assumed)


# ---- Models, without their weights

Kind = Literal["policy", "reward model", "critic", "classifier"]

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
    "EleutherAI/pythia-2.8b": {
        "model_type": "gpt_neox",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 50304,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""The published configurations of the models that the shipped recipes name: a plan of them needs no hub."""


@lru_cache(maxsize=32)
def _architecture(settings_json: str, kind: Kind, vocabulary: int | None) -> Architecture:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from exalign.errors import first_line
    from exalign.models.loading import read_config, with_lora

    settings = ModelSettings.model_validate_json(settings_json)
    source = settings.source and (adapter_base(Path(settings.source)) or settings.source)
    if source is not None and source.startswith("runs/") and not exists(Path(source)):
        raise InputError(f"There is no folder {source} yet: carry out the run that makes it, then plan with it.")
    auto_class: Any = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    try:
        if source is None:
            scratch = {} if vocabulary is None else {"vocab_size": vocabulary}
            config, origin = AutoConfig.for_model(**{**scratch, **(settings.config or {})}), "the recipe's config"
        elif source in PUBLIC_CONFIGURATIONS:  # without waiting for a hub that may not be reachable
            config, origin = AutoConfig.for_model(**PUBLIC_CONFIGURATIONS[source]), "its published configuration"
        else:
            config, origin = read_config(settings, None), "its own configuration"
        if kind != "policy":
            config.num_labels = 2 if kind == "classifier" else 1
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in a way that will go
            model = auto_class.from_config(
                config, dtype=getattr(torch, settings.dtype), trust_remote_code=settings.trust_remote_code
            )
            model = with_lora(model, settings.lora, task="CAUSAL_LM" if kind == "policy" else "SEQ_CLS")
    except InputError:
        raise
    except Exception as error:  # transformers raises many kinds here, all of them about the given values
        raise InputError(
            f"No {kind} can be made of {settings.source or 'this config'} ({first_line(error)})."
        ) from None
    return Architecture(settings.source or str(config.model_type), model, origin)


def architecture_of(settings: ModelSettings, kind: Kind, vocabulary: int | None) -> Architecture:
    """The model that these settings load. `vocabulary` is the size of the tokenizer of a model from a config.

    A source whose configuration is neither readable nor built in, or a config that is not valid, is an `InputError`.
    """
    return _architecture(settings.model_dump_json(), kind, vocabulary)


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


def rows_of(source: DataSettings, name: str) -> tuple[int, str]:
    """How much `data.NAME` takes from a source after `skip` and `limit`, and how that is known.

    Rows; of preferences the pairs that they give, of the evaluation different prompts. Local data is read to its end.
    """
    if exists(Path(source.source)):
        records = read_source(whole(source), Counter())
        if name == "preferences":
            counted = sum(max(1, len(record.completions) // 2) for record in records)
        elif name in ("evaluation", "validation"):
            counted = len({prompt_digest(record) for record in records})
        else:
            counted = sum(1 for _ in records)
        return counted, f"counted in {source.source}"
    published = "/".join(filter(None, (source.source, source.data_dir)))
    if (rows := PUBLISHED_ROWS.get((published, source.split or "train"))) is not None:
        left = max(0, round(source.share * rows) - source.skip)
        return min(left, source.limit or left), f"published size of {published}"
    if source.limit is not None:
        return source.limit, f"limit; {source.source} is not here to be counted"
    return UNKNOWN_ROWS, f"assumed, {source.source} is not here to be counted: give --prompts"


# ---- The cost of training, reading and drawing


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device by what they are for; `copies` are those in bfloat16, of autocast and of what draws,
    `exchange` is what several devices need to work together."""

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


@dataclass(frozen=True, slots=True)
class Cost:
    """A stage, or a part of one. `tokens` counts each prompt once.

    `replicated` is the memory of a device that holds everything, `sharded` that of one under a full shard (training on
    all devices only). `bound`: `operations`, or `batch` where a step has fewer micro-batches than devices.
    """

    tokens: int
    flops: float
    seconds: float
    bound: str
    replicated: Memory
    sharded: Memory | None = None
    stage: str = ""

    def fits(self, usable: float) -> str:
        """`yes`, `sharded` where only a full shard fits, or `no`."""
        if self.replicated.total <= usable:
            return "yes"
        return "sharded" if self.sharded is not None and self.sharded.total <= usable else "no"


def in_turn(parts: Sequence[Cost], times: int = 1) -> Cost:
    """Parts that follow one another, `times`: the longest gives the bound, the fullest the memory."""
    fullest = max(parts, key=lambda part: part.replicated.total)
    tokens, flops, seconds = (times * sum(getattr(part, n) for part in parts) for n in ("tokens", "flops", "seconds"))
    bound = max(parts, key=lambda part: part.seconds).bound
    return Cost(tokens, flops, seconds, bound, fullest.replicated, fullest.sharded)


def train(
    models: Sequence[Architecture], settings: TrainSettings, load: Load, machine: Machine, *, passes: int
) -> Cost:
    """`models` trained together on every group, `passes` times."""
    from exalign.models.flops import forward_flops, training_flops

    groups, group, half = passes * load.prompts, [load.group()], settings.precision == "bf16"
    again, batch = settings.gradient_checkpointing, min(settings.batch_prompts, load.prompts)
    budget, again = training_sizes(
        models, machine.sizing, token_budget=settings.token_budget, checkpointing=again, autocast=half
    )
    necessary = groups * sum(training_flops(model.module, group) for model in models)
    repeated = again * groups * sum(forward_flops(model.module, group) for model in models)
    micro = -(-batch // max(1, budget // load.group_tokens))  # micro-batches of a step: what devices can share
    rounds = -(-micro // machine.count) / micro
    # A micro-batch is at its fullest with the budget, with one group of the longest texts, or with the whole step.
    tokens = min(max(budget, load.longest_group), batch * load.longest_group)
    activations = sum(
        tokens * model.training_activations(autocast=half, checkpointed=again)
        + model.head_activations(tokens, machine.sizing)
        for model in models
    )
    gradients = 4 * sum(model.trained for model in models)
    whole = Memory(
        weights=sum(model.weight_bytes for model in models),
        gradients=gradients,
        optimizer=sum(model.state_bytes for model in models) - gradients,
        copies=half * sum(model.half_copies for model in models),
        activations=activations,
        exchange=gradients if machine.count > 1 else 0,  # DDP's buckets
    )
    return Cost(
        passes * load.tokens,
        necessary,
        (necessary + repeated) * rounds / machine.rate(settings.precision),
        "batch" if micro < machine.count else "operations",
        whole,
        _sharded(whole, models, machine.count, half=half),
    )


def _sharded(whole: Memory, models: Sequence[Architecture], count: int, *, half: bool) -> Memory:
    """The same under a full shard (FSDP2) over `count` devices.

    Gathered at a time: the embeddings and the head, the block that works and the one that comes next, in the type of
    the products, and the gradient of the largest of these before it is scattered.
    """
    exchange = 0.0
    for model in models:
        factor = 0.5 if half and model.element_size == 4 else 1.0
        root = model.weight_bytes - model.layers * model.layer_bytes
        trained_share = model.trained_bytes / model.weight_bytes
        exchange += factor * (root + 2 * model.layer_bytes) + max(root, model.layer_bytes) * trained_share
    divided = {name: getattr(whole, name) / count for name in ("weights", "gradients", "optimizer")}
    return replace(whole, **divided, copies=0.0, exchange=exchange)  # what is gathered has the products' type


def read(
    model: Architecture,
    load: Load,
    machine: Machine,
    token_budget: int | Auto | None = "auto",
    precision: str = "fp32",
) -> Cost:
    """Groups computed without gradients: scores, and log-probabilities of a policy. `bf16` is autocast."""
    if not model.shares_prompts:
        load = replace(load, prompts=load.prompts * load.completions, completions=1)
    tokens = max(tokens_to_read([model], machine.sizing, token_budget), load.longest_group)
    half = precision == "bf16"
    memory = replace(_reading(model, tokens, machine), copies=model.half_copies if half else 0.0)
    return _dealt_out(model, load, machine, machine.rate("bf16" if half else model.precision), memory)


def _reading(model: Architecture, tokens: int, machine: Machine) -> Memory:
    """One device that computes `tokens` tokens at a time without gradients."""
    activations = tokens * model.reading_activations() + 2 * model.head_activations(tokens, machine.sizing, kept=False)
    return Memory(weights=model.weight_bytes, activations=activations)


_FIRST_CAPACITY, _ENTERING_TOKENS = 32, 2048  # the sampler's: rows of a new cache, and prompt tokens read in one step


def draw(
    model: Architecture, load: Load, settings: SampleSettings, machine: Machine, together: int | None = None
) -> Cost:
    """K completions for each prompt of `load`, of which `together` prompts (None: all) are at hand at a time.

    Memory is the weights, the cache of all groups in flight at their longest, and the logits of a step.
    """
    from exalign.run.materials import SHARD, SHARD_COMPLETIONS

    share = -(-load.prompts // min(machine.count, load.prompts))  # of the device that has most
    rows = completions_at_once(
        [model],
        machine.sizing,
        settings.batch_completions,
        prompt_tokens=load.longest_prompt / load.completions,
        tokens=load.longest_completion,
    )
    shard = min(SHARD, -(-SHARD_COMPLETIONS // load.completions))
    at_hand = shard if together is None else -(-together // machine.count)
    groups = max(1, min(rows // load.completions, share, shard, at_hand))  # whole ones, at least one
    rows = groups * load.completions
    working = _reading(model, max(_ENTERING_TOKENS, load.longest_prompt) + rows, machine)
    logits = rows * model.vocabulary * (4 + model.element_size)
    cache = float(groups * cache_tokens(load) * model.cache_bytes_per_token)
    half = _draws_rounded(model, settings)
    cache, copies = (cache / 2, 2.0 * model.parameters) if half else (cache, 0.0)
    memory = replace(working, cache=cache, copies=copies, activations=working.activations + logits)
    rate = machine.rate("bf16" if half else model.precision, sampling=True)
    return _dealt_out(model, load, machine, rate, memory)


def _draws_rounded(model: Architecture, settings: SampleSettings) -> bool:
    return settings.precision == "bf16" and model.precision == "fp32"


def cache_tokens(load: Load) -> int:
    """Tokens for which one group's cache has room when its completions are as long as they may be.

    A prompt's are kept once per group, a completion's in rows that grow by doubling from 32. The last token of a
    completion is never read, so T − 1 are cached.
    """
    room, last = _FIRST_CAPACITY, load.longest_completion - 1
    while room < last:
        room *= 2
    return load.longest_prompt + (load.completions * room if last else 0)


def _dealt_out(model: Architecture, load: Load, machine: Machine, rate: float, memory: Memory) -> Cost:
    from exalign.models.flops import forward_flops

    flops = load.prompts * forward_flops(model.module, [load.group()])
    return Cost(load.tokens, flops, flops / rate / min(machine.count, load.prompts), "operations", memory)


# ---- The stages of a recipe


class Budget:
    """A recipe's `costs` on a machine: of all stages that compute with a model. `said`: what was assumed about data and
    models, each sentence once."""

    def __init__(self, recipe: Recipe, machine: Machine) -> None:
        from exalign.run.stages import plan as stages_of

        self.recipe, self.machine = recipe, machine
        self.said: dict[str, None] = {}
        self._known: dict[str, list[tuple[int, str]]] = {}  # each file is read once
        self.costs = [cost for stage in stages_of(self.recipe) if (cost := self.cost(stage.name)) is not None]

    def cost(self, stage: str) -> Cost | None:
        """The cost of a stage, which one function for each kind knows; None where it computes with no model."""
        kind, _, rest = stage.partition("/")
        known = getattr(self, f"_{kind}", None)
        found = None if known is None else known(rest)
        return found and replace(found, stage=stage)

    def _sft(self, _: str) -> Cost:
        settings, load = self.recipe.sft, self.given("sft" if self.recipe.data.sft is not None else "preferences", 1)
        assert settings is not None
        if settings.train_on_prompts:  # every token but the first is a target
            whole, longest = load.group_tokens - 1, load.longest_group - 1
            load = replace(load, prompt_tokens=1, completion_tokens=whole, longest_prompt=1, longest_completion=longest)
        policy = self.model(self.recipe.model, "policy")
        return train([policy], settings, load, self.machine, passes=settings.epochs)

    def _oracle(self, _: str) -> Cost:
        settings = self.recipe.oracle
        assert settings is not None
        load = self._load("labelled", 1, settings.max_tokens)
        load = replace(load, longest_prompt=min(load.longest_prompt, settings.max_tokens))
        model = self.model(settings.model, "classifier")
        return train([model], settings, load, self.machine, passes=settings.epochs)

    def _reward(self, _: str) -> Cost:
        settings = self.recipe.reward
        assert settings is not None
        model = self.model(settings.model or self.recipe.model, "reward model")
        return train([model], settings, self.pairs(), self.machine, passes=settings.epochs)

    def _preferences(self, _: str) -> Cost | None:
        settings = self.recipe.preferences
        return None if settings is None else self._drawn(self.sampled(2), settings.scorer)

    def _rollouts(self, _: str) -> Cost:
        return draw(self.supervised(), self.rewarded(), self.recipe.sample, self.machine)

    def _scored(self, _: str) -> Cost | None:
        scorers = self.scorers(self.recipe.scoring) if self.recipe.data.rewards is None else []
        return in_turn([read(scorer, self.rewarded(), self.machine) for scorer in scorers]) if scorers else None

    def _reference(self, rest: str) -> Cost:
        """log π_sft of all that is aligned on, for the methods of one precision: KIND or KIND-PRECISION."""
        kind, _, precision = rest.partition("-")
        load = self.pairs() if kind == "preference" else self.rewarded()
        return read(self.supervised(), load, self.machine, precision=precision or "fp32")

    def _align(self, name: str) -> Cost | None:
        """The method's training; none where a search before it has done so, or where it is given."""
        searched = self.recipe.search is not None and name in self.recipe.search.methods
        return None if searched or self.recipe.align[name].given else self.method(name)

    def _search(self, name: str) -> Cost:
        """Every trial: trained as the recipe's own settings train, and what it saves tried on validation prompts."""
        assert self.recipe.search is not None
        tried = in_turn([self._validation("")], self.policies(name))
        return in_turn([self.method(name), tried], self.recipe.search.trials)

    def method(self, name: str) -> Cost:
        """A method's training; where it samples for itself, also the drawing, the scores, and what its models say."""
        settings = self.recipe.align[name]
        load, amount, draws = self.load_of(settings), settings.amount, settings.trains_on == "prompts"
        machine, times = self.machine, 1 if settings.swept is None else len(settings.swept[1])
        models = [self.model(self.recipe.model, "policy")]
        if amount.critic is not None:
            models.append(self.model(self.recipe.model if amount.critic == "policy" else amount.critic, "critic"))
        trained = train(models, settings, load, machine, passes=times * amount.passes)
        every = replace(load, prompts=load.prompts * times * (amount.draws if draws else amount.reads))
        how = (settings.token_budget, settings.precision)
        if not draws:
            return in_turn([trained, read(models[0], every, machine, *how)]) if amount.reads else trained
        reference, scorers = self.supervised(), self.scorers(self.recipe.scoring)
        drawn = draw(reference, every, self.recipe.sample, machine, amount.together)
        told = [reference, *(models if amount.critic is not None else [])]
        reads = [*(read(model, every, machine, *how) for model in told), *(read(s, every, machine) for s in scorers)]
        beside = sum(model.weight_bytes for model in (reference, *scorers))

        def fullest(state: Memory, gathered: float = 0.0) -> Memory:
            """All models stand on the device, and the copy that draws. Gradients go before it does."""
            training = replace(state, copies=state.copies + drawn.replicated.copies)
            drawing = replace(drawn.replicated, weights=state.weights + gathered, optimizer=state.optimizer)
            most = max(training, drawing, key=lambda one: one.total)
            return replace(most, weights=most.weights + beside)

        assert trained.sharded is not None
        sharded = fullest(trained.sharded, gathered=trained.replicated.weights)
        return replace(in_turn([trained, drawn, *reads]), replicated=fullest(trained.replicated), sharded=sharded)

    def _validation(self, _: str) -> Cost:
        search = self.recipe.search
        assert search is not None
        name = "evaluation" if self.recipe.data.validation is None else "validation"
        load = self.evaluation(search.prompts, search.samples, name)
        return self._drawn(load, self.recipe.judging, reference=True)

    def _evaluation(self, rest: str) -> Cost | None:
        """Samples of π_sft, its pool, or of every policy that a method saved: drawn, scored, and log π_sft of them.

        For density ratios π_sft and a method's last policy read the pool's samples of a few prompts; held-out pairs are
        read by π_sft and by every policy saved.
        """
        settings, judge, drawn = self.recipe.evaluate, self.recipe.judging, rest.startswith("drawn/")
        what, _, name = rest.removeprefix("drawn/").partition("/")
        pool = self.evaluation(settings.pool_prompts, settings.pool_samples)
        if what == "prompts":
            return None
        if what == "density":
            few = replace(pool, prompts=min(pool.prompts, settings.density_prompts))
            return in_turn([read(self.supervised(), few, self.machine, None)], 2)
        whose = name if what in ("pairs", "answers") else what
        once = whose in ("", "sft", "pool", "proxy")
        times = 1 if once else self.policies(whose)
        if what == "pairs" and not self._gives_pairs:
            return None
        if what == "pairs":
            pairs = self.evaluation(settings.pairs, 2)
            return in_turn([read(self.supervised(), pairs, self.machine, None)], times)
        load = pool if what in ("pool", "proxy") else self.evaluation(settings.prompts, settings.samples)
        if drawn or judge is None:
            told = what not in ("answers", "pool")
            return in_turn([self._drawn(load, None, reference=told, trained=not once)], times)
        scorers = self.scorers(self.recipe.scoring if what == "proxy" else judge)
        return in_turn([read(scorer, load, self.machine) for scorer in scorers], times) if scorers else None

    @cached_property
    def _gives_pairs(self) -> bool:
        """Whether rows of the evaluation are preferences: seen where they are here, else taken so of rows that are not
        texts to be cut."""
        if holds_out(self.recipe):
            return True
        sources = each(self.recipe.data.evaluation or [])
        here = [source for source in sources if exists(Path(source.source))]
        read = (record for source in here for record in read_source(whole(source), Counter()))
        unseen = any(source.prompt_tokens is None for source in sources if source not in here)
        return unseen or any(record.preferred is not None for record in read)

    def _drawn(
        self, load: Load, settings: ScorerSettings | None, *, reference: bool = False, trained: bool = False
    ) -> Cost:
        """Samples for a load, their rewards, and log π_sft of them."""
        policy, sampling = self.supervised(), self.recipe.sample
        parts = [draw(policy, load, sampling, self.machine)]
        parts += [read(scorer, load, self.machine) for scorer in self.scorers(settings)]
        # By the policy too, where it is another and a copy of it draws.
        told = reference * (1 + (trained and _draws_rounded(policy, sampling)))
        return in_turn([*parts, *told * [read(policy, load, self.machine, None)]])

    def policies(self, name: str) -> int:
        """How many policies a method saves."""
        from exalign.training.batches import saved_steps

        method = self.recipe.align[name]
        if several := method.given or (method.swept or ("", ()))[1]:
            return len(several)
        steps = method.amount.passes * -(-self.load_of(method).prompts // method.batch_prompts)
        return len(saved_steps(steps, method.save_policies, idle=method.idle_steps))

    # -- Loads

    def load_of(self, method: Method) -> Load:
        if method.trains_on == "preferences":
            return self.pairs()
        load = self.sampled(self.recipe.sample.num_completions) if method.trains_on == "prompts" else self.rewarded()
        return replace(load, completions=method.num_completions or load.completions)

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

    def evaluation(self, prompts: int, samples: int, name: str = "evaluation") -> Load:
        """Samples for prompts of `data.NAME`, or of preferences that are held out; there may be fewer."""
        if name == "evaluation" and holds_out(self.recipe):
            name = "preferences"
        load = self._load(name, samples, self.recipe.sample.max_new_tokens, trained_on=False)
        return replace(load, prompts=min(prompts, load.prompts))

    def _load(self, name: str, completions: int, longest: int, *, trained_on: bool = True) -> Load:
        sources, assumed = each(getattr(self.recipe.data, name)), self.machine.assumed
        longest_prompt, given = self.recipe.data.max_prompt_tokens, assumed.prompt_tokens
        if given is not None and given > longest_prompt:
            raise InputError(f"--prompt-tokens {given} is above data.max_prompt_tokens = {longest_prompt}; lower it.")
        prompt = given or min(sources[0].prompt_tokens or max(1, longest_prompt // 2), longest_prompt)
        completion = min(assumed.completion_tokens or max(1, longest // 2), longest)
        if assumed.prompts is not None and name != "evaluation":
            found = [(assumed.prompts, "--prompts")]
        else:
            found = self._known[name] = self._known.get(name) or [rows_of(source, name) for source in sources]
        if not (rows := sum(number for number, _ in found)):
            raise InputError(f"data.{name}: {named(sources)} has no usable rows.")
        if name == "preferences" and holds_out(self.recipe):
            held_out = min(max(round(self.recipe.data.held_out * rows), 1), self.recipe.evaluate.pairs)
            rows = max(rows - held_out, 1) if trained_on else held_out
        self.said |= {f"data.{name}: {number:,} rows ({how})": None for number, how in found}
        return Load(rows, completions, prompt, completion, longest_prompt, longest)

    # -- Models

    def scorers(self, settings: ScorerSettings | None) -> list[Architecture]:
        """The models behind a scorer, or behind each part of a sum."""
        if settings is None:
            return []
        return [model for part in settings.sum or (settings,) if (model := self._scorer(part)) is not None]

    def _scorer(self, settings: OneScorer) -> Architecture | None:
        """The model behind a scorer, as it is loaded: adapters merged; a function has none."""
        recipe = self.recipe
        if settings.function is not None:
            self.said[f"{settings.function} costs nothing"] = None
            return None
        loaded = {"lora": None, "dtype": settings.dtype}
        if settings.stage == "reward":
            assert recipe.reward is not None
            return self.model((recipe.reward.model or recipe.model).model_copy(update=loaded), "reward model")
        if settings.stage == "oracle":
            assert recipe.oracle is not None
            return self.model(recipe.oracle.model.model_copy(update=loaded), "classifier")
        source = settings.reward_model or settings.classifier
        loads = ModelSettings(source=source, dtype=settings.dtype)
        return self.model(loads, "reward model" if settings.reward_model else "classifier")

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
        if tokenizer.source is not None and exists(Path(tokenizer.source)):
            return len(load_tokenizer(tokenizer.source))
        if tokenizer.source is not None:
            self.said[f"{tokenizer.source} is not here: the vocabulary is that of the model's kind"] = None
        return None


# ---- Printing

_FITS = {"yes": "[green]yes[/]", "sharded": "[yellow]sharded[/]", "no": "[bold red]no[/]"}


def print_budget(budget: Budget, console: Console) -> None:
    """Work and hours, memory of one device, the totals, and every assumption."""
    machine = budget.machine
    about = f" on {machine.count} × {machine.name}. Nothing here was measured: every number follows from the "
    console.print(
        Text.assemble(shown(budget.recipe.name, "bold"), about, "recipe, formulas and the assumptions below.")
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 0))
    for name in ("stage", "tokens", "PFLOP", "time", "bound", "GB", "sharded", "fits"):
        long = name == "stage"  # it gives way where there is no room: of a number nothing may be lost
        table.add_column(
            name, justify="left" if long or name == "bound" else "right", no_wrap=not long, overflow="fold"
        )
    for cost in budget.costs:
        memory = (_gigabytes(cost.replicated), _gigabytes(cost.sharded) if cost.sharded else "–")
        bound = "" if cost.bound == "operations" else cost.bound
        table.add_row(shown(cost.stage), *_work(cost), bound, *memory, _FITS[cost.fits(machine.usable)])
    table.add_section()
    if budget.costs:
        table.add_row("all", *_work(in_turn(budget.costs)))
    console.print(table)
    console.print("[bold]Assumed[/]")
    for sentence in assumptions(budget):
        console.print(Text.assemble("  • ", shown(sentence)))


def assumptions(budget: Budget) -> list[str]:
    """Every assumption as a sentence: the device's specification, the shares, the lengths, the data and the models."""
    machine, assumed = budget.machine, budget.machine.assumed
    prompt = assumed.prompt_tokens or "half the longest, or data.*.prompt_tokens where set"
    given = assumed.completion_tokens
    completion = "half the longest" if given is None else f"{given}, or the longest where that is less"
    return [
        f"{machine.name}: {machine.memory / 1e9:,.0f} GB, dense products {machine.bf16 / 1e12:,.3g} TFLOP/s in bf16 "
        f"and {machine.fp32 / 1e12:,.3g} in fp32 ({machine.specification})",
        f"{assumed.training_share:.0%} of that rate for necessary work (--training-share), "
        f"{assumed.sampling_share:.0%} in sampling (--sampling-share), {assumed.memory_share:.0%} of the memory "
        "(--memory-share); what devices exchange is not in the time",
        f"tokens: mean prompt {prompt}; mean completion {completion} "
        "(--prompt-tokens, --completion-tokens). Memory is for the longest",
        "GB: of one device, then of one under a full shard in the manner of FSDP2",
        "bound by operations, or: batch, with fewer micro-batches than devices",
        "methods that sample while they train: whole models on every device while it draws",
        *budget.said,
    ]


def as_values(budget: Budget) -> dict[str, Any]:
    """The same in seconds, bytes and operations, for JSON."""
    usable = budget.machine.usable
    return {
        "recipe": budget.recipe.name,
        "machine": {**asdict(budget.machine), "assumed": budget.machine.assumed.model_dump()},
        "said": assumptions(budget),
        "usable_bytes": usable,
        "stages": [{**asdict(cost), "fits": cost.fits(usable)} for cost in budget.costs],
        "total": {n: sum(getattr(cost, n) for cost in budget.costs) for n in ("tokens", "flops", "seconds")},
    }


def _work(cost: Cost) -> tuple[str, str, str]:
    operations = cost.flops / 1e15
    said = "<0.01" if operations < 0.01 else f"{operations:.3g}" if operations < 999.5 else f"{operations:,.0f}"
    return quantity(cost.tokens), said, duration(cost.seconds)


def quantity(number: float) -> str:
    """A count in at most five characters.

    >>> quantity(950), quantity(124_439_808), quantity(7_615_616_512), quantity(4e13), quantity(999_600)
    ('950', '124M', '7.62B', '40T', '1M')
    """
    number = float(f"{number:.3g}")
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


def _gigabytes(memory: Memory) -> str:
    gigabytes = memory.total / 1e9
    return "<0.1" if gigabytes < 0.05 else f"{gigabytes:,.{1 if gigabytes < 1000 else 0}f}"
