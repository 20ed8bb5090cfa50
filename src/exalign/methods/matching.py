"""Alignment by matching: the policy's distribution over the K completions of a prompt is moved onto a target's.

EXO is reverse KL, DPO is forward KL, each with a target from rewards or from a preference (Eqs. 7, 15, 18, 19).

With `fresh_every` the completions come from the policy itself while it trains (`methods.on_policy`), and both
distributions over the K are corrected for the policy q that drew them: `p_f ∝ exp(β_π log π_θ + (1 − β_π) log π_sft −
log q)`, `p_r ∝ exp(log π_sft + r/β_r − log q)`. The target therefore stays the optimum around π_sft, however far q has
gone; without the correction every rollout would aim at the optimum around the last one. Not in the paper, where
q = π_sft and both lines are Eqs. 12 and 14. On-policy, q = π_θ, β_π = 1 makes p_f uniform and EXO's gradient that of
RLOO with the KL in the reward; a smaller β_π sends own samples back towards π_sft. A preference between two own samples
needs no correction: it compares them as they are, wherever they came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, get_args

from pydantic import Field, model_validator

from exalign.errors import InputError
from exalign.methods.method import Amount, Material, Method, TrainsOn, train_on
from exalign.methods.on_policy import OwnSamples, drawn_how, fresh_problems, own_amount, train_on_own_samples
from exalign.rollout.settings import SampleSettings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from exalign.data.batching import Group, GroupValues
    from exalign.training.batches import Batches

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "jeffreys", "alpha"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)


class Matching(Method):
    """Moves the policy's distribution over the K completions of a prompt onto a target's: EXO, DPO and their family."""

    divergence: Divergence = Field("reverse_kl", description="what is minimised: reverse_kl is EXO, forward_kl is DPO")
    target: Literal["reward", "preference"] = Field("reward", description="what the K completions are matched to")
    beta_pi: float = Field(
        0.5,
        gt=0,
        description="β_π: weight of the log-ratio in the policy's distribution (Eq. 12); with fresh_every and a reward "
        "target 1 where nothing is said",
    )
    beta_r: float = Field(0.1, gt=0, description="β_r: temperature of the rewards in a reward target (Eq. 14)")
    beta_r_std: float | None = Field(
        None,
        gt=0,
        description="β_r in standard deviations of the rewards within a prompt, over the samples that are trained on, "
        "in the place of beta_r; with β_π = 1 the optimum of normal rewards lies 1/(2 x²) nats away, 1 nat at 0.7",
    )
    epsilon: float = Field(
        1e-3, ge=0, lt=1, description="ε: mass a preference target leaves the others (Eq. 18); 0: DPO as published"
    )
    alpha: float = Field(0.5, gt=0, lt=1, description="α of the divergence alpha: near 1 like EXO, near 0 like DPO")
    fresh_every: int | None = Field(
        None,
        gt=0,
        description="optimizer steps that own samples serve: so often completions are drawn from the policy as it is, "
        "scored, and corrected for where they came from; 1 is on-policy, None is offline",
    )
    passes: int = Field(1, gt=0, description="with fresh_every: times each rollout is trained on")

    @model_validator(mode="after")
    def _on_policy_beta(self) -> Matching:
        """Own samples are sent back towards π_sft by a β_π below 1, so it is 1 where none is given."""
        if self.fresh_every is not None and self.target == "reward" and "beta_pi" not in self.model_fields_set:
            self.__dict__["beta_pi"] = 1.0
        return self

    @property
    def trains_on(self) -> TrainsOn:
        if self.fresh_every is not None:
            return "prompts"
        return "preferences" if self.target == "preference" else "rewards"

    @property
    def label(self) -> str:
        return {"reverse_kl": "EXO", "forward_kl": "DPO"}.get(self.divergence, self.divergence.replace("_", "–"))

    @property
    def family(self) -> str:
        return {"reverse_kl": "exo", "forward_kl": "dpo"}.get(self.divergence, "other")

    @property
    def optimum_beta(self) -> float | None:
        return self.beta_pi * self.beta_r if self.target == "reward" else None

    def at_beta(self, beta: float) -> Method:
        return self.model_copy(update={"beta_r_std": None}).at("beta_r", beta / self.beta_pi)

    def settled(self, groups: Sequence[Group]) -> Self:
        rewards = [group.rewards.double() for group in groups if group.rewards is not None and len(group.rewards) > 1]
        if self.beta_r_std is None or not rewards:
            return self
        spread = math.sqrt(math.fsum(float(values.var()) for values in rewards) / len(rewards))
        if not spread > 0:
            raise InputError(
                "beta_r_std: all completions of a prompt have the same reward, so there is nothing to learn. Look at "
                "what a reward function is given: of a chat model a completion is a list of one message."
            )
        return self.model_copy(update={"beta_r": self.beta_r_std * spread})

    @property
    def line(self) -> str:
        last = f"β_r {self.beta_r:g}" if self.target == "reward" else f"ε {self.epsilon:g}"
        if self.beta_r_std is not None and not self.changed("beta_r"):  # not settled yet
            last = f"β_r {self.beta_r_std:g} standard deviations of the rewards"
        own = "" if self.fresh_every is None else f", {drawn_how(self.fresh_every)}"
        return f"{self.label}, {self.target} target, β_π {self.beta_pi:g}, {last}{own}"

    @property
    def amount(self) -> Amount:
        return Amount(self.epochs) if self.fresh_every is None else own_amount(self)

    def problems(self) -> Iterator[str]:
        idle = "epsilon" if self.target == "reward" else "beta_r"
        if self.changed(idle):
            yield f"{idle} has no effect on a {self.target} target; remove it"
        if self.beta_r_std is not None and (self.target != "reward" or self.fresh_every is not None):
            yield "beta_r_std is of the rewards of given samples, which this method does not train on; remove it"
        elif self.beta_r_std is not None and self.changed("beta_r"):
            yield "beta_r has no effect beside beta_r_std; remove one of them"
        if self.target == "preference" and self.epsilon == 0 and self.divergence in ("reverse_kl", "jeffreys"):
            yield f"epsilon = 0 makes the divergence {self.divergence} infinite; give one above 0, as 1e-3"
        if self.divergence != "alpha" and self.changed("alpha"):
            yield f"alpha has no effect on the divergence {self.divergence}; remove it"
        if self.fresh_every is not None:
            yield from fresh_problems(self)
        elif self.passes != 1:
            yield "passes has no effect without fresh_every; use epochs"

    def sampling_problems(self, sampling: SampleSettings) -> Iterator[str]:
        if self.target == "preference" and sampling.num_completions % 2:
            yield "orders own samples two by two; give an even sample.num_completions"
        elif sampling.num_completions < 2:
            yield "compares at least two completions of a prompt; raise sample.num_completions"

    @property
    def warning(self) -> str | None:
        if self.fresh_every is None or self.target == "preference" or self.beta_pi == 1:
            return None
        return (
            f"β_π = {self.beta_pi:g} sends the policy's own samples back towards the supervised policy by the weight "
            "(π_sft/π_θ)^(1 − β_π); with fresh_every β_π = 1 is the exact objective"
        )

    def problem_with(self, num_completions: int) -> str | None:
        num_completions = num_completions if self.fresh_every is None else 2  # own samples are ordered two by two
        if self.target == "reward" or self.epsilon < 1 - 1 / num_completions:
            return None
        return (
            f"of {num_completions} completions the preferred one would get no more than the others with epsilon = "
            f"{self.epsilon:g}; choose one below {1 - 1 / num_completions:g}."
        )

    def train(self, material: Material, folder: Path) -> Path:
        if self.fresh_every is None:
            given = (material.policy, material.tokenizer, material.groups, self.settled(material.groups), folder)
            return train_matching(*given, temperature=material.temperature, held_out=material.held_out)
        from exalign.models.logprobs import PackedPolicy

        module, took = PackedPolicy(material.policy), partial(check_groups, settings=self)
        own = OwnSamples(module, material, self, folder, took=took)
        how = f"to a {self.target} target, {drawn_how(self.fresh_every)}, at τ = {material.temperature}"
        text = f"A language model aligned by {self.divergence} {how}."
        task = MatchingTask(own.batches, self, material.temperature, own)
        return train_on_own_samples(task, own, folder, title="Aligned policy", text=text)


def distance_of(settings: Matching) -> Callable[..., Tensor]:
    """The divergence as a function of `log_p_policy`, `log_p_target` and a mask."""
    from exalign.objectives import divergences

    if settings.divergence == "alpha":
        return partial(divergences.alpha_divergence, alpha=settings.alpha)
    chosen: Callable[..., Tensor] = getattr(divergences, settings.divergence)
    return chosen


@dataclass(frozen=True, slots=True)
class MatchingTask:
    """D(p_f, p_r) per prompt, in nats; the weight is the prompts, each times that of its row.

    On own samples with a preference target a prompt is its pairs of samples, two by two as they were drawn, less those
    of equal rewards.
    """

    batches: Batches
    settings: Matching
    temperature: float
    own: OwnSamples | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """What a step's row says of the rollout that it belongs to."""
        return {} if self.own is None else self.own.numbers

    def weight(self, groups: Sequence[Group]) -> float:
        return sum(group.weight for group in self._compared(groups))

    def _compared(self, groups: Sequence[Group]) -> Sequence[Group]:
        own_pairs = self.own is not None and self.settings.target == "preference"
        return [pair for group in groups for pair in pairs_of(group)] if own_pairs else groups

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        from exalign import objectives
        from exalign.data.batching import values_of
        from exalign.models.logprobs import completion_logprobs

        policy_logp = completion_logprobs(model, groups, temperature=self.temperature)
        given = values_of(groups, policy_logp.device)
        seen = {}
        if self.own is not None:
            seen, given = self.own.correction(policy_logp, given), self.own.drawn_by(policy_logp, given)
        compared = self._compared(groups)
        if compared is not groups:
            seen = {name: value.repeat_interleave(len(compared) // len(groups)) for name, value in seen.items()}
            given, policy_logp = values_of(compared, policy_logp.device), policy_logp.view(len(compared), 2)
        mask, reference_logp = given.mask, given.reference_logp
        assert reference_logp is not None
        log_p_policy = objectives.log_policy_distribution(
            policy_logp, reference_logp, beta_pi=self.settings.beta_pi, mask=mask, proposal_logp=given.proposal_logp
        )
        log_p_target = self._log_target(given)
        loss = distance_of(self.settings)(log_p_policy, log_p_target, mask)
        metrics = log_ratio_metrics(given, policy_logp.detach(), pairs=self.settings.target == "preference")
        if compared is groups:
            metrics |= self._reward_metrics(given, policy_logp.detach(), reference_logp)
        else:  # pairs of own samples: they need no correction, and the rollout's numbers say their reward
            seen.pop("effective_samples")
        metrics["saturated"] = objectives.saturated(log_p_policy.detach(), log_p_target, mask).to(loss.dtype)
        weights = given.weights.to(loss.dtype)
        return (loss * weights).sum(), {name: (value * weights).sum() for name, value in (metrics | seen).items()}

    def _reward_metrics(self, given: GroupValues, policy_logp: Tensor, reference_logp: Tensor) -> dict[str, Tensor]:
        from exalign import objectives

        if given.rewards is None:
            return {}
        mask, sampled_from = given.mask, reference_logp if given.proposal_logp is None else given.proposal_logp
        log_weights = objectives.log_importance_weights(policy_logp, sampled_from, mask)
        spread = objectives.group_spread(given.rewards, mask) / self.settings.beta_r
        return {
            "reward": objectives.weighted_mean(log_weights, given.rewards, mask),
            **({"reward_spread": spread} if self.settings.target == "reward" else {}),
            # 1 for every optimum: how much of the way from π_sft is for the reward.
            "reward_correlation": objectives.reward_correlation(policy_logp, reference_logp, given.rewards, mask),
        }

    def _log_target(self, given: GroupValues) -> Tensor:
        from exalign import objectives

        settings = self.settings
        if settings.target == "preference":
            assert given.preferred is not None
            return objectives.log_preference_target(
                given.preferred, num_completions=given.mask.shape[1], epsilon=settings.epsilon, mask=given.mask
            )
        assert given.rewards is not None
        return objectives.log_reward_target(
            given.rewards,
            beta_r=settings.beta_r,
            mask=given.mask,
            reference_logp=None if given.proposal_logp is None else given.reference_logp,
            proposal_logp=given.proposal_logp,
        )


def log_ratio_metrics(given: GroupValues, policy_logp: Tensor, *, pairs: bool) -> dict[str, Tensor]:
    """Per prompt `[B]`, in nats; those of `pairs` are of the log-ratio, log π_θ − log π_sft."""
    from exalign import objectives

    mask, reference_logp = given.mask, given.reference_logp
    assert reference_logp is not None
    sampled_from = reference_logp if given.proposal_logp is None else given.proposal_logp
    log_weights = objectives.log_importance_weights(policy_logp, sampled_from, mask)
    reference_weights = objectives.log_importance_weights(reference_logp, sampled_from, mask)
    log_ratio = policy_logp - reference_logp
    metrics = {
        # KL(π_θ‖π_sft) with both self-normalised over the K: between 0 and log K, so low where it is large.
        "kl": objectives.reverse_kl(log_weights, reference_weights, mask),
        "log_ratio_spread": objectives.group_spread(log_ratio, mask),
        "completion_tokens": given.tokens.to(log_ratio.dtype),
    }
    if pairs:
        assert given.preferred is not None
        accuracy, margin = objectives.preference_accuracy(log_ratio, given.preferred, mask)
        chosen = log_ratio.gather(1, given.preferred[:, None]).squeeze(1)
        metrics |= {"accuracy": accuracy, "margin": margin}
        metrics |= {"chosen_log_ratio": chosen, "rejected_log_ratio": chosen - margin}
    return metrics


def train_matching(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    settings: Matching,
    folder: Path,
    *,
    temperature: float,
    held_out: Sequence[Group] = (),
) -> Path:
    """Align a policy on groups with `reference_logp` and rewards or a preference; `loop.train` says what is written.

    `temperature` is the recipe's τ, under which the reference log-probabilities were computed.
    """
    from exalign.models.logprobs import PackedPolicy

    check_groups([*groups, *held_out], settings)
    if settings.target == "preference" and any(group.rewards is None for group in (*groups, *held_out)):
        # Else metrics of rewards would depend on which rows share a micro-batch.
        groups, held_out = ([replace(group, rewards=None) for group in some] for some in (groups, held_out))
    text = f"A language model aligned by {settings.divergence} to a {settings.target} target at τ = {temperature}."
    task = partial(MatchingTask, settings=settings, temperature=temperature)
    card = ("Aligned policy", text, "text-generation")
    return train_on(groups, task, PackedPolicy(model), tokenizer, settings, folder, card=card, held_out=held_out)


def with_reference_logp(
    model: nn.Module, groups: Sequence[Group], settings: Method, *, temperature: float
) -> list[Group]:
    """The groups with log π(y|x) under `model`, the policy before alignment, as `reference_logp`.

    The same code, packing budget and precision as in training, so that every log-ratio starts at 0.
    """
    from exalign.rollout.rollout import Numerics, logprobs_of

    filled: list[Group] = []
    numerics = Numerics(temperature, settings.token_budget, settings.precision)
    for start in range(0, len(groups), settings.batch_prompts):
        part = groups[start : start + settings.batch_prompts]
        found = logprobs_of(part, model, numerics)
        filled += [replace(group, reference_logp=logp) for group, logp in zip(part, found, strict=True)]
    return filled


def check_groups(groups: Sequence[Group], settings: Method, *, fewest: int = 2) -> None:
    """Raise an `InputError` that names the first row which lacks what the settings need, or `fewest` completions."""
    prefers = settings.trains_on == "preferences"
    for group in groups:
        if group.num_completions < fewest:
            raise InputError(f"Row {group.index} has one completion; alignment compares at least two.")
        if group.reference_logp is None:
            raise InputError(
                f"Row {group.index} has no reference_logp, log π_sft(y|x); fill it in with `with_reference_logp`."
            )
        if prefers and group.preferred is None:
            raise InputError(f"Row {group.index} has no preferred completion, which target 'preference' needs.")
        if (problem := settings.problem_with(group.num_completions)) is not None:
            raise InputError(f"Row {group.index}: {problem}")
        if not prefers and group.rewards is None:
            raise InputError(f"Row {group.index} has no rewards, which target 'reward' needs.")
        for name in ("rewards", "reference_logp", "proposal_logp"):
            values = getattr(group, name)
            if values is not None and not bool(values.isfinite().all()):
                raise InputError(f"Row {group.index} has a value in {name} that is not finite.")


def pairs_of(group: Group) -> Iterator[Group]:
    """The K scored completions two by two, (1, 2), (3, 4), …, the one with the higher reward preferred.

    Each with its share of the group's weight; equal rewards prefer none and weigh nothing. As `pairs_from_rewards`.
    """
    assert group.rewards is not None and group.reference_logp is not None
    share = 2 * group.weight / group.num_completions
    for first in range(0, group.num_completions, 2):
        two, rewards = slice(first, first + 2), group.rewards[first : first + 2]
        yield replace(
            group,
            completion_ids=group.completion_ids[two],
            rewards=rewards,
            preferred=int(rewards.argmax()),
            reference_logp=group.reference_logp[two],
            proposal_logp=None,
            weight=share if rewards[0] != rewards[1] else 0.0,
        )
