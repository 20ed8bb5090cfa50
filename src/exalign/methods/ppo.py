"""PPO, the baseline: rollouts of the current policy, rewarded per token, and clipped steps of policy and critic.

The reward of a completion comes with its last token; every token pays β per nat by which the policy has left π_sft
there. Mathematics: `objectives.policy_gradient`. What differs from the paper's sources is said at `PPOSettings`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.batching import Group, completion_token_mask, group_of
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.methods.sft import completion_tokens
from exalign.models.capability import device_of
from exalign.models.heads import ActorCritic
from exalign.models.logprobs import completion_token_logprobs
from exalign.models.memory import computed
from exalign.objectives import (
    adapted_kl_coefficient,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalised_advantages,
    is_clipped,
    token_rewards,
    whiten,
)
from exalign.processes import gathered, in_order, share_of
from exalign.rollout.sampler import GroupedSampler
from exalign.rollout.scorers import Scorer, scored
from exalign.rollout.settings import SampleSettings
from exalign.storage import fingerprint
from exalign.training.distributed import Whole
from exalign.training.loop import model_card, train
from exalign.training.rollouts import RolloutBatches, RolloutCounts, RolloutPlan
from exalign.training.settings import MAX_KL_ERROR, PPOSettings


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a policy acts in: prompts, how it is sampled at `temperature`, what rewards it, and π_sft.

    `counts` takes what the samplers of all processes count; prompts that are sampled again after an interruption count
    again.
    """

    prompts: Sequence[Record]
    sampling: SampleSettings
    scorer: Scorer
    reference: PreTrainedModel
    temperature: float
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A prompt with its completions, their rewards `[K]`, and three `[K, T]` under the weights they were drawn from.

    On the CPU; T is at least the longest completion, with 0 after the end of each.
    """

    group: Group
    rewards: Tensor
    logp: Tensor
    values: Tensor
    reference_logp: Tensor


@dataclass(frozen=True, slots=True)
class Experience:
    """A rollout as `[R, K, T]` tensors on the policy's device, 0 on padding, and its numbers, each over the rollout."""

    logp: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    numbers: dict[str, float]

    def of(self, name: str, groups: Sequence[Group], like: Tensor) -> Tensor:
        """The rows of these groups as `[B·K, T]`, cut to the shape `[B, K, T]` of `like`."""
        rows = torch.tensor([group.index for group in groups], device=like.device)
        values: Tensor = getattr(self, name)
        return values[rows, : like.shape[1], : like.shape[2]].flatten(0, 1)


class PPO:
    """The task: per token the clipped loss of the policy, in units of whitened advantages, plus that of the critic.

    The weight is the completion tokens. During the first `critic_steps` the loss is the critic's alone: the policy
    gets no gradient at all. Metrics `reward`, `beta`, `kl` (nats per completion, log π_θ − log π_sft), `entropy` (nats
    per token, estimated by −log π of the tokens drawn), `completion_tokens` and `explained_variance` are those of the
    rollout that the step belongs to; `policy_loss`, `value_loss` and `clip_fraction` of the step itself.
    """

    def __init__(
        self,
        module: ActorCritic,
        tokenizer: PreTrainedTokenizerBase,
        world: Surroundings,
        settings: PPOSettings,
        note_counts: Callable[[int, Sequence[Counter[str]]], None] = lambda number, counts: None,
    ) -> None:
        self.module = module
        self.whole = Whole(module)
        self.tokenizer = tokenizer
        self.world = world
        self.settings = settings
        module.kl_coefficient.fill_(settings.beta)
        self._note_counts = note_counts
        self._experience: Experience | None = None
        how = fingerprint([world.sampling.model_dump(exclude={"batch_completions"}), world.temperature])
        self.batches = RolloutBatches(world.prompts, rollout_plan(settings), self.draw, sampled_how=how)

    def weight(self, groups: Sequence[Group]) -> float:
        return completion_tokens(groups)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        assert self._experience is not None
        experience, settings = self._experience, self.settings
        logp, values = model(groups, temperature=self.world.temperature, critic_alone=self.critic_alone)
        mask = completion_token_mask(groups).to(logp.device).flatten(0, 1)
        sampled_logp, advantages, sampled_values, returns = (
            experience.of(name, groups, logp) for name in ("logp", "advantages", "values", "returns")
        )
        ratio_of = (logp.flatten(0, 1), sampled_logp, advantages, mask)
        policy_loss = clipped_policy_loss(*ratio_of, clip=settings.clip).sum()
        value_loss = clipped_value_loss(values.flatten(0, 1), sampled_values, returns, mask, clip=settings.value_clip)
        value_loss = value_loss.sum()
        metrics = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "clip_fraction": is_clipped(*ratio_of, clip=settings.clip).sum().to(policy_loss.dtype),
        }
        weight = self.weight(groups)
        metrics |= {name: value_loss.new_tensor(number * weight) for name, number in experience.numbers.items()}
        return (value_loss if self.critic_alone else policy_loss + value_loss), metrics

    @property
    def critic_alone(self) -> bool:
        """Whether the step under way is one of those before the policy moves."""
        return self.batches.step < self.settings.critic_steps

    def draw(self, records: list[Record], number: int) -> list[Group]:
        """Sample, score and value rollout `number` from policy and critic as they are now.

        Each process does so for its share of the prompts, whose samples depend on nothing but the prompt, and gets the
        experience of all. Sharded weights are whole on every process meanwhile.
        """
        seed = int(fingerprint([self.settings.seed, "rollout", number]), 16) >> 1
        with self.whole.everywhere() as module:
            shares = gathered(self._sampled(module, share_of(records), seed))
        self._note_counts(number, [counts for _, counts in shares])
        sampled = in_order([share for share, _ in shares])
        groups = [replace(one.group, index=index) for index, one in enumerate(sampled)]
        self._experience = self._experience_of(groups, sampled)
        self._adapt(self._experience.numbers["kl"])
        return groups

    @property
    def beta(self) -> float:
        """β as it is now."""
        return self.settings.beta if self.settings.target_kl is None else self.module.kl_coefficient.item()

    def _adapt(self, kl: float) -> None:
        """Give β its value for the next rollout, which the checkpoint between them keeps.

        Until the policy has made a step its KL is 0 whatever β is, and β stays: a departure from the source.
        """
        settings = self.settings
        if settings.target_kl is not None and self.batches.step > settings.critic_steps:
            adapted = adapted_kl_coefficient(
                self.beta, kl, target=settings.target_kl, rate=settings.kl_rate, clip=MAX_KL_ERROR
            )
            self.module.kl_coefficient.fill_(adapted)

    @torch.no_grad()
    def _sampled(self, module: ActorCritic, records: Sequence[Record], seed: int) -> tuple[list[Sampled], Counter[str]]:
        world, settings, policy = self.world, self.settings, module.model
        if not records:
            return [], Counter()
        sampler = GroupedSampler(policy, self.tokenizer, world.sampling, temperature=world.temperature, seed=seed)  # type: ignore[arg-type]
        drawn = list(sampler.sample(records))
        groups = [group_of(record, index) for index, record in enumerate(drawn)]
        counts, device = Counter(sampler.counts), device_of(policy)
        rewards = [record.rewards for record in scored(world.scorer, drawn, counts)]
        world.reference.to(device)  # type: ignore[arg-type]  # a stub's overloads
        found: dict[int, list[Tensor]] = {}

        def valued(part: Sequence[Group]) -> tuple[Tensor, ...]:
            with _precision(settings, device):
                logp, values = module(part, temperature=world.temperature)
                reference_logp = completion_token_logprobs(world.reference, part, temperature=world.temperature)
            return logp.cpu(), values.cpu(), reference_logp.cpu()

        for part, tensors in computed(valued, groups, token_budget=settings.token_budget):
            rows = zip(part, *tensors, strict=True)
            found |= {group.index: [part.clone() for part in parts] for group, *parts in rows}  # rows, not the batch
        return [
            Sampled(group, torch.tensor(reward, dtype=torch.float32), *found[group.index])
            for group, reward in zip(groups, rewards, strict=True)
        ], counts

    @torch.no_grad()
    def _experience_of(self, groups: list[Group], sampled: list[Sampled]) -> Experience:
        settings, device = self.settings, device_of(self.module)
        mask = completion_token_mask(groups).to(device)
        rewards = torch.stack([one.rewards for one in sampled]).to(device)
        logp, values, reference_logp = (
            torch.stack([nn.functional.pad(row, (0, mask.shape[2] - row.shape[1])) for row in rows]).to(device)
            for rows in zip(*((one.logp, one.values, one.reference_logp) for one in sampled), strict=True)
        )
        flat_mask, flat_values = mask.flatten(0, 1), values.flatten(0, 1)
        log_ratio = (logp - reference_logp).flatten(0, 1)
        beta = self.beta
        per_token = token_rewards(rewards.flatten(), log_ratio, flat_mask, beta=beta)
        advantages = generalised_advantages(per_token, flat_values, flat_mask, gamma=settings.gamma, lam=settings.lam)
        returns, tokens = advantages + flat_values, flat_mask.sum()
        numbers: dict[str, float | Tensor] = {
            "reward": rewards.mean(),
            "beta": beta,
            "kl": log_ratio.sum() / rewards.numel(),
            "entropy": -logp.sum() / tokens,
            "completion_tokens": tokens / rewards.numel(),
            "explained_variance": explained_variance(flat_values, returns, flat_mask),
        }
        return Experience(
            logp,
            values,
            whiten(advantages, flat_mask).view(mask.shape),
            returns.view(mask.shape),
            {name: float(value) for name, value in numbers.items()},
        )


def train_ppo(
    module: ActorCritic,
    tokenizer: PreTrainedTokenizerBase,
    world: Surroundings,
    settings: PPOSettings,
    folder: Path,
) -> Path:
    """Train the policy of `module`, and its critic with it; `loop.train` says what is written: the policy alone.

    The critic is trained on states of completions that the policy draws, and is kept in checkpoints only.
    Checkpoints stand between rollouts: `checkpoint_every` is rounded up to whole rollouts.
    """
    if world.sampling.top_p is not None or world.sampling.top_k is not None:
        raise InputError("PPO needs samples of the policy itself; remove top_p and top_k.")
    plan = rollout_plan(settings)
    placed = settings.model_copy(update={"checkpoint_every": plan.whole_rollouts(settings.checkpoint_every)})
    card = model_card(
        "Policy trained by PPO",
        f"A language model trained by PPO with a KL penalty per token at τ = {world.temperature}.",
        settings,
        pipeline_tag="text-generation",
    )
    counted = RolloutCounts(Path(folder) / "rollouts.json")
    task = PPO(module, tokenizer, world, settings, counted.note)
    path = train(task, module, tokenizer, placed, folder, card=card)
    world.counts.update(counted.total(task.batches.num_rollouts))
    return path


def rollout_plan(settings: PPOSettings) -> RolloutPlan:
    """How these settings turn rollouts into steps."""
    return RolloutPlan(
        settings.rollout_prompts, settings.batch_prompts, settings.passes, settings.epochs, settings.seed
    )


def _precision(settings: PPOSettings, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
