"""What a method of alignment is: an object that is its own settings, and knows what it needs, trains and is called.

A method is one class in one file. Those in this folder are named by their file (`method: ppo`), any other as
`module:Class`. Recipe, search, plan, evaluation and report ask the object; none of them knows a name.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from exalign import methods
from exalign.errors import InputError
from exalign.models.model_settings import ModelSettings
from exalign.rollout.own_modules import own_module
from exalign.rollout.settings import SampleSettings
from exalign.settings import FUNCTION, STEP_SIZE
from exalign.training.train_settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from exalign.data.batching import Group
    from exalign.data.record import Record
    from exalign.rollout.scorers import Scorer
    from exalign.training.batches import EpochBatches
    from exalign.training.loop import Task, Trainable

# What needs torch is imported where it is used: a recipe is checked by settings before anything is loaded.

TrainsOn = Literal["preferences", "rewards", "prompts", "nothing"]


@dataclass(frozen=True)
class Material:
    """What a method trains with: the policy and, by what it `trains_on`, groups or what it draws its own samples from.

    `policy` is π_sft, trainable; `groups` carry log π_sft and rewards or a preference, and so do those `held_out`,
    which nothing is trained on and it is measured on. A method that trains on prompts samples them from the policy as
    `sampling` says at τ = `temperature`, rewards the samples by `scorer` and takes log π_sft from `reference`. `critic`
    is what a scalar model starts from. Prompts sampled again after an interruption count again in `counts`.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    groups: Sequence[Group] = ()
    held_out: Sequence[Group] = ()
    prompts: Sequence[Record] = ()
    sampling: SampleSettings = field(default_factory=SampleSettings)
    scorer: Scorer | None = None
    reference: PreTrainedModel | None = None
    critic: ModelSettings | None = None
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Amount:
    """How much a method computes, for a plan: every group is trained on `passes` times.

    One that trains on prompts draws completions for each prompt `draws` times, `together` prompts at a time. A `critic`
    is trained beside the policy, from a model of its own or from the policy. One that trains on groups reads as much as
    all of them `reads` times more, without a gradient.
    """

    passes: int
    reads: int = 0
    draws: int = 1
    together: int | None = None
    critic: ModelSettings | Literal["policy"] | None = None


class Method(TrainSettings):
    """A way to align a policy. A subclass adds its settings, `train`, and what others need to know of it."""

    method: str = Field(
        "matching",
        description="the method: matching (EXO, DPO, the family), ppo, simpo, …, or module:Class",
        json_schema_extra=FUNCTION,
    )
    learning_rate: float = Field(1e-6, gt=0, description="peak learning rate of AdamW", json_schema_extra=STEP_SIZE)
    num_completions: int | None = Field(
        None,
        gt=1,
        description="K of this method: it trains on so many completions of a prompt, the first that were drawn or "
        "given; null: on all",
    )
    stop_after: int | None = Field(
        None,
        gt=0,
        description="training ends where so many saved policies in a row have no lower loss on held-out prompts than "
        "the best before, and that one is the model; a method on rewards holds out data.held_out of its prompts for "
        "it; null: it goes to its end",
    )
    sweep: dict[str, tuple[int | float, ...]] | None = Field(
        None,
        description="a frontier by end points: one setting with its values, from near to far, and a policy for "
        "each, trained anew; {kl: [0.5, 1, 2]} are the nats at which the optima lie that are aimed at, and β is chosen "
        "for them from the evaluation's pool; null: the checkpoints along one training",
    )

    def changed(self, name: str) -> bool:
        """Whether this setting is not its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @property
    def swept(self) -> tuple[str, tuple[int | float, ...]] | None:
        """The setting of the sweep (`kl` for the nats of the optimum) and its values; None where there is none."""
        return next(iter(self.sweep.items()), None) if self.sweep else None

    def at(self, setting: str, value: float) -> Method:
        """The same method with one value of its sweep, saving its last policy alone, or those that say when it ends."""
        saved = 1 if self.stop_after is None else self.save_policies
        settings = self.model_dump(mode="json") | {"sweep": None, setting: value, "save_policies": saved}
        return type(self).model_validate_json(json.dumps(settings))

    def at_beta(self, beta: float) -> Method:
        """The same method aimed at the optimum of this β, where it aims at one."""
        return self.at("beta", beta)

    def settled(self, groups: Sequence[Group]) -> Self:
        """The same method with what it takes from the groups that it trains on."""
        return self

    @property
    def trains_on(self) -> TrainsOn:
        """`preferences` or `rewards`: groups with log π_sft; `prompts`: it samples them itself while it trains.

        `nothing`: its policies are `given`, and `train` is never called.
        """
        raise NotImplementedError

    @property
    def label(self) -> str:
        return type(self).__name__

    @property
    def family(self) -> str:
        """What it is drawn like: `exo`, `dpo`, `ppo` have colours of their own, others share one."""
        return "other"

    @property
    def optimum_beta(self) -> float | None:
        """β of the optimum that it aims at, π* ∝ π_sft exp(r/β); None where it has none."""
        return None

    @property
    def line(self) -> str:
        return (type(self).__doc__ or "").strip().split("\n")[0].removesuffix(".")

    def described(self) -> dict[str, Any]:
        on = {"preferences": "preference", "nothing": None}.get(self.trains_on, "reward")
        return {
            "label": self.label,
            "family": self.family,
            "target": getattr(self, "target", on),
            "beta": self.optimum_beta,
            "line": self.line,
            "settings": self.model_dump(mode="json"),
        }

    @property
    def amount(self) -> Amount:
        return Amount(passes=self.epochs)

    @property
    def given(self) -> Sequence[str]:
        """Folders or hub names of policies that are there already, where it trains on nothing."""
        return ()

    @property
    def wants_critic(self) -> bool:
        """Whether `Material.critic` is to be this run's reward model where that started from π_sft, else π_sft."""
        return False

    def problems(self) -> Iterator[str]:
        """Sentences, without a name in front, about settings that cannot take effect."""
        yield from ()

    @property
    def warning(self) -> str | None:
        """A sentence about a choice that is allowed and rarely meant; None where there is none."""
        return None

    def sampling_problems(self, sampling: SampleSettings) -> Iterator[str]:
        """Sentences about a recipe's `sample` with which it cannot train, where it trains on samples."""
        yield from ()

    def problem_with(self, num_completions: int) -> str | None:
        """A sentence about prompts with this number of completions, where it cannot train on them."""
        return None

    def train(self, material: Material, folder: Path) -> Path:
        """Train `material.policy` in `folder`, continuing what stands there; `loop.train` says what is written."""
        raise NotImplementedError


def train_on(
    groups: Sequence[Group],
    task_of: Callable[[EpochBatches], Task],
    module: Trainable,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    folder: Path,
    *,
    card: tuple[str, str, str],
    held_out: Sequence[Group] = (),
) -> Path:
    """Train on epochs of `groups`; `loop.train` says what is written. `card`: title, text and tag of the model card."""
    from exalign.training.batches import EpochBatches
    from exalign.training.loop import HeldOut, model_card, train

    batches = EpochBatches(groups, batch_prompts=settings.batch_prompts, epochs=settings.epochs, seed=settings.seed)
    text = model_card(*card[:2], settings, pipeline_tag=card[2])
    measured = HeldOut(held_out, settings.stop_after if isinstance(settings, Method) else None)
    return train(task_of(batches), module, tokenizer, settings, folder, card=text, held_out=measured)


def available() -> list[str]:
    return sorted(name for name in _files() if _class_in(f"exalign.methods.{name}") is not None)


def _files() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(methods.__path__)]


def method_class(name: str) -> type[Method]:
    """The class of `ppo` or `module:Class`; an unknown one is an `InputError` that lists those there are.

    A module is looked for in the working directory too, as those of reward functions are.
    """
    module, colon, attribute = name.partition(":")
    if colon:
        found: Any = getattr(own_module(module, f"method: {module}"), attribute, None)
    else:
        found = _class_in(f"exalign.methods.{name}") if name in _files() else None
    if isinstance(found, type) and issubclass(found, Method):
        return found
    if colon:
        raise InputError(f"method: {name} is no subclass of exalign.methods.method.Method.")
    raise InputError(
        f"method: {name[:100]!r} is none; there are {', '.join(available())}, and module:Class of your own."
    )


def _class_in(module: str) -> type[Method] | None:
    """The method that a module defines, if it does; what several have in common is abstract."""
    found = importlib.import_module(module)
    own = (value for value in vars(found).values() if isinstance(value, type) and value.__module__ == module)
    return next(
        (value for value in own if issubclass(value, Method) and value is not Method and not inspect.isabstract(value)),
        None,
    )
