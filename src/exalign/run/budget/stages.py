"""Every stage of a recipe with its cost, in the order in which a run carries them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exalign.methods.ppo import PPO
from exalign.models.loading import load_tokenizer
from exalign.models.model_settings import ModelSettings
from exalign.rollout.settings import OneScorer, ScorerSettings
from exalign.run.budget.architecture import Architecture, Kind, architecture_of
from exalign.run.budget.cost import (
    STORED_BYTES_PER_TOKEN,
    Cost,
    forward_cost,
    frozen,
    sampling_cost,
    together,
    training_cost,
)
from exalign.run.budget.devices import Machine
from exalign.run.budget.load import Load, Loads
from exalign.run.budget.memory import Memory, sampling_memory, training_memory
from exalign.run.evaluation_stages import evaluation_scorer
from exalign.run.materials import SCORING_TOKENS
from exalign.run.recipe import Recipe
from exalign.run.stages import plan, reference_name
from exalign.training.batches import saved_steps
from exalign.training.train_settings import TrainSettings

SCORER_TOKENS = 4096
"""Tokens that a scorer computes at a time."""


@dataclass(frozen=True)
class Budget:
    """A recipe's costs on a machine. `said` are the assumptions that this recipe called for, as sentences."""

    recipe: Recipe
    machine: Machine
    costs: tuple[Cost, ...]
    said: tuple[str, ...]

    @property
    def flops(self) -> float:
        return sum(cost.flops for cost in self.costs)

    @property
    def seconds(self) -> float:
        """Stage after stage."""
        return sum(cost.seconds for cost in self.costs)

    @property
    def tokens(self) -> int:
        return sum(cost.tokens for cost in self.costs)

    @property
    def stored(self) -> float:
        return sum(cost.stored for cost in self.costs)


def budget_of(recipe: Recipe, machine: Machine) -> Budget:
    """The costs of all stages that compute with a model, and what was assumed about data and models."""
    pricing = _Pricing(recipe, machine, Loads(recipe, machine.assumed))
    costs = tuple(cost for stage in plan(recipe) if (cost := pricing.cost(stage.name)) is not None)
    return Budget(recipe, machine, costs, (*pricing.loads.said, *pricing.said))


class _Pricing:
    def __init__(self, recipe: Recipe, machine: Machine, loads: Loads) -> None:
        self.recipe = recipe
        self.machine = machine
        self.loads = loads
        self.said: dict[str, None] = {}

    def cost(self, stage: str) -> Cost | None:
        """The cost of a stage; None where it computes with no model."""
        recipe, parts = self.recipe, stage.split("/")
        if stage == "sft":
            assert recipe.sft is not None
            return training_cost(stage, [self.policy()], recipe.sft, self.loads.supervised(), self.machine)
        if stage == "oracle":
            assert recipe.oracle is not None
            model = self.model(recipe.oracle.model, "classifier")
            return training_cost(stage, [model], recipe.oracle, self.loads.labelled(), self.machine)
        if stage == "preferences" and recipe.preferences is not None:
            return self.drawn_and_scored(stage, self.loads.sampled(2), recipe.preferences.scorer)
        if stage == "reward":
            assert recipe.reward is not None
            return training_cost(stage, [self.reward_model()], recipe.reward, self.loads.pairs(), self.machine)
        if stage == "rollouts":
            load = self.loads.rewarded()
            return sampling_cost(stage, self.frozen_policy(), load, recipe.sample, self.machine)
        if stage == "scored" and recipe.data.rewards is None:
            costs = self.scored(stage, self.loads.rewarded(), recipe.score.scorer)
            return _written(together(stage, costs)) if costs else None
        if parts[0] == "search":
            return self.searched(stage, parts[1])
        if parts[0] in ("reference", "align"):
            return self.own_stage(parts[1]) if parts[0] == "align" else self.aligned(stage)
        if stage == "validation":
            return self.drawn_and_scored(stage, self.validation(), evaluation_scorer(recipe), reference=True)
        if parts[0] == "evaluation" and parts[1] not in ("prompts", "density"):
            return self.evaluated(stage, parts[1])
        return None

    def method(self, name: str) -> Cost:
        """A method by its name, in whatever way it trains."""
        if name in self.recipe.ppo:
            return self.ppo(name)
        return self.aligned(f"align/{name}") if self.recipe.align[name].rounds == 1 else self.in_rounds(name)

    def own_stage(self, name: str) -> Cost:
        """A method's training, which is done where a search comes before it."""
        cost, search = self.method(name), self.recipe.search
        if search is None or name not in search.methods:
            return cost
        return replace(cost, tokens=0, flops=0.0, seconds=0.0, bound="search")

    def searched(self, stage: str, name: str) -> Cost:
        """Every trial: trained as the recipe's own settings train, and what it saves tried on validation prompts.

        Beside the best trial's weights, which the method's stage takes over, one trial's are stored.
        """
        assert self.recipe.search is not None
        number, trained = self.recipe.search.trials, self.method(name)
        tried = self.drawn_and_scored(stage, self.validation(), evaluation_scorer(self.recipe), reference=True)
        evaluated = [tried] * self.policies(name)
        stored = trained.stored + number * sum(part.stored for part in evaluated)
        return replace(together(stage, [trained, *evaluated] * number), stored=stored)

    def validation(self) -> Load:
        assert self.recipe.search is not None
        return replace(
            self.loads.evaluation(), prompts=self.recipe.search.prompts, completions=self.recipe.search.samples
        )

    def in_rounds(self, name: str) -> Cost:
        """All rounds together: drawn from the policy, scored, π_sft and policy on them, and trained; on one device."""
        recipe, settings, one = self.recipe, self.recipe.align[name], replace(self.machine, count=1)
        policy, reference = self.policy(), self.frozen_policy()
        load = self.loads.sampled(recipe.sample.num_completions)
        trained = training_cost("", [policy], settings, load, one)
        parts, beside = [trained, sampling_cost("", reference, load, recipe.sample, one)], frozen(reference)
        parts.append(
            forward_cost("", reference, load, one, token_budget=settings.token_budget, precision=settings.precision)
        )
        scorer = self.scorer(recipe.score.scorer)
        if scorer is not None:
            parts.append(forward_cost("", scorer, load, one, token_budget=SCORER_TOKENS))
            beside += frozen(scorer)
        part = replace(load, prompts=-(-load.prompts // settings.rounds))
        whole = _largest([policy], settings, part, sampling_memory(reference, part, recipe.sample.batch_completions))
        cost = together(f"align/{name}", parts)
        return replace(cost, devices=1, trained=trained.trained, replicated=whole + beside, sharded=None)

    def aligned(self, stage: str) -> Cost:
        """A method, or the reference of the methods that share it."""
        reading = stage.startswith("reference/")
        name = next(
            n for n, s in self.recipe.align.items() if (reference_name(s) if reading else f"align/{n}") == stage
        )
        settings = self.recipe.align[name]
        load = self.loads.pairs() if settings.target == "preference" else self.loads.rewarded()
        if not reading:
            return training_cost(stage, [self.policy()], settings, load, self.machine)
        budget, precision = settings.token_budget, settings.precision
        policy = self.frozen_policy()
        return _written(forward_cost(stage, policy, load, self.machine, token_budget=budget, precision=precision))

    def ppo(self, name: str) -> Cost:
        """Rollouts, their scores, what policy, critic and reference say of them, and the passes: on one device."""
        recipe, settings, one = self.recipe, self.recipe.ppo[name], replace(self.machine, count=1)
        policy, critic, reference = self.policy(), self.critic(settings), self.frozen_policy()
        load = self.loads.sampled(recipe.sample.num_completions)
        every = replace(load, prompts=load.prompts * settings.epochs)
        passes = settings.model_copy(update={"epochs": settings.epochs * settings.passes})
        trained = training_cost("", [policy, critic], passes, load, one)
        parts = [trained, sampling_cost("", reference, every, recipe.sample, one)]
        parts += [
            forward_cost("", model, every, one, token_budget=settings.token_budget, precision=settings.precision)
            for model in (policy, critic, reference)
        ]
        beside = frozen(reference)
        scorer = self.scorer(recipe.score.scorer)
        if scorer is not None:
            parts.append(forward_cost("", scorer, every, one, token_budget=SCORER_TOKENS))
            beside += frozen(scorer)
        rollout = replace(load, prompts=min(settings.rollout_prompts, load.prompts))
        sampling = sampling_memory(reference, rollout, recipe.sample.batch_completions)
        whole = _largest([policy, critic], settings, load, sampling) + beside
        cost = together(f"align/{name}", parts)
        return replace(cost, devices=1, trained=trained.trained, replicated=whole, sharded=None)

    def evaluated(self, stage: str, what: str) -> Cost:
        """Samples of π_sft, its pool, or of every policy that a method saved: drawn, scored, and log π_sft of them.

        With a method's come its density ratios.
        """
        load = self.loads.pool() if what == "pool" else self.loads.evaluation()
        scorer = evaluation_scorer(self.recipe)
        cost = self.drawn_and_scored(stage, load, scorer, reference=what != "pool")
        if what in ("sft", "pool"):
            return cost
        return together(stage, [cost] * self.policies(what) + self.density(stage))

    def density(self, stage: str) -> list[Cost]:
        """π_sft and a method's last policy on the pool's samples of a few prompts, for density ratios."""
        prompts = min(self.recipe.evaluate.pool_prompts, self.recipe.evaluate.density_prompts)
        if not prompts:
            return []
        load, policy = replace(self.loads.pool(), prompts=prompts), self.frozen_policy()
        return 2 * [forward_cost(stage, policy, load, self.machine, token_budget=SCORING_TOKENS)]

    def policies(self, method: str) -> int:
        """How many policies a method saves."""
        settings = self.recipe.align.get(method) or self.recipe.ppo[method]
        if method in self.recipe.ppo:
            load = self.loads.sampled(self.recipe.sample.num_completions)
            passes = self.recipe.ppo[method].passes
        else:
            paired = self.recipe.align[method].target == "preference"
            load, passes = self.loads.pairs() if paired else self.loads.rewarded(), 1
        steps = passes * settings.epochs * -(-load.prompts // settings.batch_prompts)
        return len(saved_steps(steps, settings.save_policies, idle=settings.idle_steps))

    def drawn_and_scored(self, stage: str, load: Load, scorer: ScorerSettings, *, reference: bool = False) -> Cost:
        policy = self.frozen_policy()
        parts = [sampling_cost(stage, policy, load, self.recipe.sample, self.machine)]
        parts += self.scored(stage, load, scorer)
        if reference:
            parts.append(forward_cost(stage, policy, load, self.machine, token_budget=SCORING_TOKENS))
        return together(stage, parts)

    def scored(self, stage: str, load: Load, settings: ScorerSettings) -> list[Cost]:
        """What the scorers cost that have a model."""
        models = [model for part in settings.sum or (settings,) if (model := self.scorer(part)) is not None]
        return [forward_cost(stage, model, load, self.machine, token_budget=SCORER_TOKENS) for model in models]

    def scorer(self, settings: OneScorer) -> Architecture | None:
        """The model behind a scorer; a function has none."""
        if settings.function is not None:
            self.say(f"{settings.function} costs nothing")
            return None
        if settings.stage == "reward":
            return self.reward_model(trained=False)
        if settings.stage == "oracle":
            assert self.recipe.oracle is not None
            return self.model(_loaded(self.recipe.oracle.model), "classifier")
        source = settings.reward_model or settings.classifier
        return self.model(ModelSettings(source=source), "reward model" if settings.reward_model else "classifier")

    def policy(self) -> Architecture:
        return self.model(self.recipe.model, "policy")

    def frozen_policy(self) -> Architecture:
        """π_sft, its adapters merged, in the type of the recipe's model."""
        return self.model(self.recipe.model.model_copy(update={"lora": None}), "policy")

    def reward_model(self, *, trained: bool = True) -> Architecture:
        assert self.recipe.reward is not None
        settings = self.recipe.reward.model or self.recipe.model
        return self.model(settings if trained else _loaded(settings), "reward model")

    def critic(self, settings: PPO) -> Architecture:
        return self.model(settings.critic or self.recipe.model, "reward model")

    def model(self, settings: ModelSettings, kind: Kind) -> Architecture:
        found = architecture_of(settings, kind, self.vocabulary() if settings.source is None else None)
        if settings.lora is None:
            self.say(f"{kind}: {found.name}, {found.parameters:,} parameters, from {found.origin}")
        else:
            self.say(
                f"{kind}: {found.name}, {found.parameters:,} parameters with adapters, of which {found.trained:,} are "
                f"trained, from {found.origin}"
            )
        return found

    def vocabulary(self) -> int | None:
        """The size of the run's tokenizer, for models from a config; None where it is not here yet."""
        tokenizer = self.recipe.tokenizer
        if tokenizer.vocab_size is not None:
            return tokenizer.vocab_size
        if tokenizer.source is not None and Path(tokenizer.source).is_dir():
            return len(load_tokenizer(tokenizer.source))
        if tokenizer.source is not None:
            self.say(f"{tokenizer.source} is not here: the vocabulary is that of the model's kind")
        return None

    def say(self, sentence: str) -> None:
        self.said[sentence] = None


def _largest(models: Sequence[Architecture], settings: TrainSettings, load: Load, sampling: Memory) -> Memory:
    """Training or drawing, whichever needs more. Gradients are gone while completions are drawn, moments are not."""
    training = training_memory(models, settings, load)
    drawing = replace(sampling, weights=training.weights, optimizer=training.optimizer)
    return max(training, drawing, key=lambda memory: memory.total)


def _written(cost: Cost) -> Cost:
    """The records are written again, with what was computed."""
    return replace(cost, stored=float(STORED_BYTES_PER_TOKEN * cost.tokens))


def _loaded(settings: ModelSettings) -> ModelSettings:
    """How a scorer loads what was trained from these settings: adapters merged, in float32."""
    return settings.model_copy(update={"lora": None, "dtype": "float32"})
