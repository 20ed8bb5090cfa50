"""Alignment by matching: the policy's distribution over the K completions of a prompt is moved onto a target's.

EXO is reverse KL, DPO is forward KL, each with a target from rewards or from a preference (Eqs. 7, 15, 18, 19).

In rounds (`rounds` above 1) the prompts are dealt into parts, and the completions of a part come from the policy q that
its round starts with, so both distributions over the K are corrected for it: `p_f ∝ exp(β_π log π_θ + (1 − β_π) log
π_sft − log q)`, `p_r ∝ exp(log π_sft + r/β_r − log q)`. The target therefore stays the optimum around π_sft, however
far q has gone; without the correction each round would aim at the optimum around the last one. Not in the paper, whose
only round is the first: there q = π_sft, and both lines are Eqs. 12 and 14. As many completions are scored as in one
round over the same prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field

from exalign.errors import InputError
from exalign.methods.method import Amount, Material, Method, TrainsOn
from exalign.processes import several
from exalign.storage import fingerprint

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from exalign.data.batching import Group, GroupValues
    from exalign.data.record import Record
    from exalign.training.batches import Batches

# What needs torch is imported where it is used: a recipe is checked by these settings before anything is loaded.

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "jeffreys", "alpha"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)


class Matching(Method):
    """Moves the policy's distribution over the K completions of a prompt onto a target's: EXO, DPO and their family."""

    divergence: Divergence = Field("reverse_kl", description="what is minimised: reverse_kl is EXO, forward_kl is DPO")
    target: Literal["reward", "preference"] = Field("reward", description="what the K completions are matched to")
    beta_pi: float = Field(0.5, gt=0, description="β_π: weight of the log-ratio in the policy's distribution (Eq. 12)")
    beta_r: float = Field(0.1, gt=0, description="β_r: temperature of the rewards in a reward target (Eq. 14)")
    epsilon: float = Field(1e-3, gt=0, lt=1, description="ε: mass a preference target leaves the others (Eq. 18)")
    alpha: float = Field(0.5, gt=0, lt=1, description="α of the divergence alpha: near 1 like EXO, near 0 like DPO")
    rounds: int = Field(
        1,
        gt=0,
        description="above 1: the prompts are dealt into so many rounds, and each round's completions are drawn from "
        "the policy as it then is, scored, and aligned on with the correction for where they came from",
    )

    @property
    def trains_on(self) -> TrainsOn:
        if self.rounds > 1:
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

    @property
    def line(self) -> str:
        last = f"β_r {self.beta_r:g}" if self.target == "reward" else f"ε {self.epsilon:g}"
        rounds = f", {self.rounds} rounds" if self.rounds > 1 else ""
        return f"{self.label}, {self.target} target, β_π {self.beta_pi:g}, {last}{rounds}"

    @property
    def amount(self) -> Amount:
        return Amount(passes=self.epochs, rounds=self.rounds)

    def problems(self) -> Iterator[str]:
        usual = type(self).model_fields
        idle = "epsilon" if self.target == "reward" else "beta_r"
        if getattr(self, idle) != usual[idle].default:
            yield f"{idle} has no effect on a {self.target} target; remove it"
        if self.divergence != "alpha" and self.alpha != usual["alpha"].default:
            yield f"alpha has no effect on the divergence {self.divergence}; remove it"
        if self.rounds > 1 and self.target == "preference":
            yield "rounds needs target: reward; preferences are not made while training"

    def problem_with(self, num_completions: int) -> str | None:
        if self.target == "reward" or self.epsilon < 1 - 1 / num_completions:
            return None
        return (
            f"of {num_completions} completions the preferred one would get no more than the others with epsilon = "
            f"{self.epsilon:g}; choose one below {1 - 1 / num_completions:g}."
        )

    def train(self, material: Material, folder: Path) -> Path:
        if self.rounds > 1:
            return train_rounds(material, self, folder)
        how = (material.policy, material.tokenizer, material.groups, self, folder)
        return train_matching(*how, temperature=material.temperature)


def distance_of(settings: Matching) -> Callable[..., Tensor]:
    """The divergence as a function of `log_p_policy`, `log_p_target` and a mask."""
    from exalign import objectives

    if settings.divergence == "alpha":
        return partial(objectives.alpha_divergence, alpha=settings.alpha)
    chosen: Callable[..., Tensor] = getattr(objectives, settings.divergence)
    return chosen


@dataclass(frozen=True, slots=True)
class MatchingTask:
    """D(p_f, p_r) per prompt, in nats; the weight is the prompts, each times that of its row."""

    batches: Batches
    settings: Matching
    temperature: float

    def weight(self, groups: Sequence[Group]) -> float:
        return sum(group.weight for group in groups)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        from exalign import objectives
        from exalign.data.batching import values_of
        from exalign.models.logprobs import completion_logprobs

        policy_logp = completion_logprobs(model, groups, temperature=self.temperature)
        given = values_of(groups, policy_logp.device)
        mask, reference_logp = given.mask, given.reference_logp
        assert reference_logp is not None
        log_p_policy = objectives.log_policy_distribution(
            policy_logp, reference_logp, beta_pi=self.settings.beta_pi, mask=mask, proposal_logp=given.proposal_logp
        )
        log_p_target = self._log_target(given)
        loss = distance_of(self.settings)(log_p_policy, log_p_target, mask)
        metrics = self._metrics(given, policy_logp.detach(), reference_logp)
        metrics["saturated"] = objectives.saturated(log_p_policy.detach(), log_p_target, mask).to(loss.dtype)
        weights = given.weights.to(loss.dtype)
        return (loss * weights).sum(), {name: (value * weights).sum() for name, value in metrics.items()}

    def _metrics(self, given: GroupValues, policy_logp: Tensor, reference_logp: Tensor) -> dict[str, Tensor]:
        """Per prompt `[B]`; those of pairs are in nats of log-ratio, log π_θ − log π_sft."""
        from exalign import objectives

        mask, sampled_from = given.mask, reference_logp if given.proposal_logp is None else given.proposal_logp
        log_weights = objectives.log_importance_weights(policy_logp, sampled_from, mask)
        reference_weights = objectives.log_importance_weights(reference_logp, sampled_from, mask)
        log_ratio = policy_logp - reference_logp
        metrics = {
            # KL(π_θ‖π_sft) with both self-normalised over the K: between 0 and log K, so low where it is large.
            "kl": objectives.reverse_kl(log_weights, reference_weights, mask),
            "log_ratio_spread": objectives.group_spread(log_ratio, mask),
            "completion_tokens": given.tokens.to(log_ratio.dtype),
        }
        if given.rewards is not None:
            metrics["reward"] = objectives.weighted_mean(log_weights, given.rewards, mask)
            metrics["reward_spread"] = objectives.group_spread(given.rewards, mask) / self.settings.beta_r
        if self.settings.target == "preference":
            assert given.preferred is not None
            accuracy, margin = objectives.preference_accuracy(log_ratio, given.preferred, mask)
            chosen = log_ratio.gather(1, given.preferred[:, None]).squeeze(1)
            metrics |= {"accuracy": accuracy, "margin": margin}
            metrics |= {"chosen_log_ratio": chosen, "rejected_log_ratio": chosen - margin}
        return metrics

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


def train_matching(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    settings: Matching,
    folder: Path,
    *,
    temperature: float,
) -> Path:
    """Align a policy on groups with `reference_logp` and rewards or a preference; `loop.train` says what is written.

    `temperature` is the recipe's τ, under which the reference log-probabilities were computed.
    """
    from exalign.models.logprobs import PackedPolicy
    from exalign.training.batches import EpochBatches
    from exalign.training.loop import train

    check_groups(groups, settings)
    batches = EpochBatches(groups, batch_prompts=settings.batch_prompts, epochs=settings.epochs, seed=settings.seed)
    card = _card(settings, f"by {settings.divergence} to a {settings.target} target at τ = {temperature}")
    task = MatchingTask(batches, settings, temperature)
    return train(task, PackedPolicy(model), tokenizer, settings, folder, card=card)


def _card(settings: Matching, how: str) -> str:
    from exalign.training.loop import model_card

    text = f"A language model aligned {how}."
    return model_card("Aligned policy", text, settings, pipeline_tag="text-generation")


def with_reference_logp(
    model: nn.Module, groups: Sequence[Group], settings: Matching, *, temperature: float
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


def check_groups(groups: Sequence[Group], settings: Matching) -> None:
    """Raise an `InputError` that names the first row which lacks what the settings need."""
    for group in groups:
        if group.num_completions < 2:
            raise InputError(f"Row {group.index} has one completion; alignment compares at least two.")
        if group.reference_logp is None:
            raise InputError(
                f"Row {group.index} has no reference_logp, log π_sft(y|x); fill it in with `with_reference_logp`."
            )
        if settings.target == "preference" and group.preferred is None:
            raise InputError(f"Row {group.index} has no preferred completion, which target 'preference' needs.")
        if (problem := settings.problem_with(group.num_completions)) is not None:
            raise InputError(f"Row {group.index}: {problem}")
        if settings.target == "reward" and group.rewards is None:
            raise InputError(f"Row {group.index} has no rewards, which target 'reward' needs.")
        for name in ("rewards", "reference_logp", "proposal_logp"):
            values = getattr(group, name)
            if values is not None and not bool(values.isfinite().all()):
                raise InputError(f"Row {group.index} has a value in {name} that is not finite.")


def train_rounds(material: Material, settings: Matching, folder: Path) -> Path:
    """Align a policy in rounds on its own samples; `loop.train` says what is written, and the samples stay.

    `epochs` counts how often each round's samples are seen. Round r is kept as records in `rollouts/round-NNN`, so an
    interrupted run does not draw it again.
    """
    from exalign.data.store import read_header
    from exalign.models.logprobs import PackedPolicy
    from exalign.training.loop import train
    from exalign.training.rollouts import RolloutBatches, RolloutPlan

    if several():
        raise InputError("rounds above 1 run in a single process; start it without accelerate launch or torchrun.")
    if settings.target != "reward":
        raise InputError("rounds above 1 need target 'reward': preferences are not made while training.")
    prompts = material.prompts
    if len(prompts) < settings.rounds:
        raise InputError(f"rounds is {settings.rounds}, but there are {len(prompts)} prompts to deal into them.")
    part = -(-len(prompts) // settings.rounds)
    plan = RolloutPlan(part, settings.batch_prompts, passes=settings.epochs, epochs=1, seed=settings.seed)
    rounds = _Rounds(material, settings, Path(folder) / "rollouts")
    how = fingerprint([material.sampling.deciding(), material.temperature])
    batches = RolloutBatches(prompts, plan, rounds.draw, sampled_how=how)
    card = _card(settings, f"by {settings.divergence} in {settings.rounds} rounds at τ = {material.temperature}")
    task = MatchingTask(batches, settings, material.temperature)
    path = train(task, PackedPolicy(material.policy), material.tokenizer, settings, folder, card=card)
    for number in range(settings.rounds):
        drawn = rounds.path(number)
        if drawn.exists():  # the last rounds are empty where the prompts do not fill them
            material.counts.update(read_header(drawn).counts)
    return path


@dataclass(frozen=True, slots=True)
class _Rounds:
    material: Material
    settings: Matching
    folder: Path

    def path(self, number: int) -> Path:
        return self.folder / f"round-{number:03d}"

    def draw(self, records: list[Record], number: int) -> list[Group]:
        """The groups of a round: read where they stand, else sampled from the policy as it is now, and scored."""
        from exalign.data.batching import group_of
        from exalign.data.store import Header, read_records, write_records

        path, material = self.path(number), self.material
        if not (path / "header.json").exists():
            counts: Counter[str] = Counter()
            drawn = self._drawn(records, number, counts)
            header = Header(temperature=material.temperature, seed=self.settings.seed, counts=dict(counts))
            write_records(path, drawn, header)
        groups = [group_of(record, index, from_proposal=True) for index, record in enumerate(read_records(path))]
        check_groups(groups, self.settings)
        return groups

    def _drawn(self, records: Sequence[Record], number: int, counts: Counter[str]) -> list[Record]:
        from exalign.rollout.rollout import Numerics, open_sampler, rollout

        material, settings, sampling = self.material, self.settings, self.material.sampling
        seed = int(fingerprint([settings.seed, "round", number]), 16) >> 1
        policy, reference = material.policy, material.reference
        assert reference is not None
        reference.to(policy.device)  # type: ignore[arg-type]  # a stub's overloads
        sampler = open_sampler(policy, material.tokenizer, sampling, temperature=material.temperature, seed=seed)
        # Drawn from the whole distribution, q is the policy itself, as the training path computes it.
        whole = sampling.top_p is None and sampling.top_k is None
        return rollout(
            records,
            sampler,
            counts,
            Numerics(material.temperature, settings.token_budget, settings.precision),
            scorer=material.scorer,
            reference=reference,
            policy=policy if whole else None,
        )
