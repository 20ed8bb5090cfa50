"""PPO, the baseline: rollouts of the current policy, rewarded per token, and clipped steps of policy and critic.

The reward of a completion comes with its last token; every token pays β per nat by which the policy has left π_sft
there. Mathematics: `objectives.policy_gradient`. What differs from the paper's sources is said at `PPO`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from exalign.errors import InputError
from exalign.methods.method import Amount, Material, Method, TrainsOn
from exalign.models.model_settings import ModelSettings
from exalign.processes import gathered, in_order, share_of
from exalign.rollout.settings import SampleSettings
from exalign.settings import STEP_SIZE
from exalign.storage import fingerprint

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from exalign.data.batching import Group
    from exalign.data.record import Record
    from exalign.models.heads import ActorCritic
    from exalign.training.rollouts import RolloutPlan

MAX_KL_ERROR = 0.2
"""c: how far a rollout's KL counts as being from the target, as a share of it."""

# What needs torch is imported where it is used: a recipe is checked by these settings before anything is loaded.


class PPO(Method):
    """Policy and critic by clipped steps on rollouts of the policy, with a KL penalty per token.

    `epochs` counts how often each prompt is sampled. β is fixed unless `target_kl` is given. There is no entropy bonus,
    and no coefficient of the value loss: policy and critic share no weights, so each has a learning rate instead.
    `max_grad_norm` is of both together.
    """

    critic: ModelSettings | None = Field(
        None,
        description="the critic to start from, with the policy's tokenizer; None: this run's reward model where it "
        "started from the supervised policy, else the supervised policy with a new head",
    )
    critic_learning_rate: float = Field(
        1e-5, gt=0, description="peak learning rate of the critic's AdamW", json_schema_extra=STEP_SIZE
    )
    rollout_prompts: int = Field(256, gt=0, description="prompts sampled from the policy at a time, then trained on")
    passes: int = Field(4, gt=0, description="times each rollout is trained on, in minibatches of batch_prompts")
    critic_steps: int = Field(0, ge=0, description="first steps, in which only the critic is trained")
    beta: float = Field(0.1, ge=0, description="β: what a nat of KL to the supervised policy costs, per token")
    target_kl: float | None = Field(
        None,
        gt=0,
        description="nats of KL per completion; after each rollout β rises if it was above, falls if below; None: β is "
        "fixed",
    )
    kl_rate: float = Field(
        0.1,
        gt=0,
        lt=1 / MAX_KL_ERROR,
        description="K: how fast β follows target_kl, at most by the share 0.2 K a rollout",
    )
    gamma: float = Field(1.0, ge=0, le=1, description="γ: discount of later rewards, per token")
    lam: float = Field(0.95, ge=0, le=1, description="λ of the advantages: 1 trusts rewards, 0 trusts the critic")
    clip: float = Field(0.2, gt=0, description="how far a token's probability ratio may go from 1 in one rollout")
    value_clip: float = Field(0.2, gt=0, description="how far a value may go in one rollout, in units of reward")

    def rate_of(self, name: str) -> float:
        """The critic has its own learning rate, on the same schedule."""
        return self.critic_learning_rate / self.learning_rate if name.startswith("critic.") else 1.0

    @property
    def leaves_some_out(self) -> bool:
        """While the critic is trained alone, the policy gets no gradient."""
        return self.critic_steps > 0

    @property
    def idle_steps(self) -> int:
        """The critic's own steps."""
        return self.critic_steps

    @property
    def trains_on(self) -> TrainsOn:
        return "prompts"

    @property
    def family(self) -> str:
        return "ppo"

    @property
    def optimum_beta(self) -> float | None:
        return self.beta if self.target_kl is None else None

    @property
    def line(self) -> str:
        aim = "" if self.target_kl is None else f", adapted to a KL of {self.target_kl:g} nats"
        return f"PPO, β {self.beta:g}{aim}"

    @property
    def wants_critic(self) -> bool:
        return self.critic is None

    @property
    def amount(self) -> Amount:
        passes = self.epochs * self.passes
        return Amount(passes, draws=self.epochs, together=self.rollout_prompts, critic=self.critic or "policy")

    def problems(self) -> Iterator[str]:
        if self.target_kl is None and self.kl_rate != type(self).model_fields["kl_rate"].default:
            yield "kl_rate has no effect without target_kl; remove it"
        if self.target_kl is not None and self.beta == 0:
            yield "beta = 0 can never change, whatever target_kl is; start from a beta above 0"

    def sampling_problems(self, sampling: SampleSettings) -> Iterator[str]:
        if sampling.top_p is not None or sampling.top_k is not None:
            yield "needs samples of the policy itself; remove sample.top_p and sample.top_k"

    def train(self, material: Material, folder: Path) -> Path:
        from exalign.models.heads import ActorCritic
        from exalign.models.loading import load_reward_model

        critic = self.critic or material.critic
        assert critic is not None
        module = ActorCritic(material.policy, load_reward_model(critic, material.tokenizer))
        return train_ppo(module, material.tokenizer, material, self, folder)


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
        import torch

        rows = torch.tensor([group.index for group in groups], device=like.device)
        values: Tensor = getattr(self, name)
        return values[rows, : like.shape[1], : like.shape[2]].flatten(0, 1)


class PPOTask:
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
        world: Material,
        settings: PPO,
        note_counts: Callable[[int, Sequence[Counter[str]]], None] = lambda number, counts: None,
    ) -> None:
        from exalign.training.distributed import Whole
        from exalign.training.rollouts import RolloutBatches

        self.module = module
        self.whole = Whole(module)
        self.tokenizer = tokenizer
        self.world = world
        self.settings = settings
        module.kl_coefficient.fill_(settings.beta)
        self._note_counts = note_counts
        self._experience: Experience | None = None
        how = fingerprint([world.sampling.deciding(), world.temperature])
        self.batches = RolloutBatches(world.prompts, rollout_plan(settings), self.draw, sampled_how=how)

    def weight(self, groups: Sequence[Group]) -> float:
        return sum(len(ids) for group in groups for ids in group.completion_ids)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        from exalign import objectives
        from exalign.data.batching import completion_token_mask

        assert self._experience is not None
        experience, settings = self._experience, self.settings
        logp, values = model(groups, temperature=self.world.temperature, critic_alone=self.critic_alone)
        mask = completion_token_mask(groups).to(logp.device).flatten(0, 1)
        sampled_logp, advantages, sampled_values, returns = (
            experience.of(name, groups, logp) for name in ("logp", "advantages", "values", "returns")
        )
        ratio_of = (logp.flatten(0, 1), sampled_logp, advantages, mask)
        policy_loss = objectives.clipped_policy_loss(*ratio_of, clip=settings.clip).sum()
        value_loss = objectives.clipped_value_loss(
            values.flatten(0, 1), sampled_values, returns, mask, clip=settings.value_clip
        )
        value_loss = value_loss.sum()
        metrics = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "clip_fraction": objectives.is_clipped(*ratio_of, clip=settings.clip).sum().to(policy_loss.dtype),
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
        from exalign import objectives

        settings = self.settings
        if settings.target_kl is not None and self.batches.step > settings.critic_steps:
            adapted = objectives.adapted_kl_coefficient(
                self.beta, kl, target=settings.target_kl, rate=settings.kl_rate, clip=MAX_KL_ERROR
            )
            self.module.kl_coefficient.fill_(adapted)

    def _sampled(self, module: ActorCritic, records: Sequence[Record], seed: int) -> tuple[list[Sampled], Counter[str]]:
        import torch

        from exalign.data.batching import group_of
        from exalign.models.capability import device_of
        from exalign.models.logprobs import completion_token_logprobs
        from exalign.models.memory import computed
        from exalign.rollout.rollout import Numerics, open_sampler, rollout

        world, settings, policy = self.world, self.settings, module.model
        counts: Counter[str] = Counter()
        if not records:
            return [], counts
        sampler = open_sampler(policy, self.tokenizer, world.sampling, temperature=world.temperature, seed=seed)  # type: ignore[arg-type]
        drawn = rollout(records, sampler, counts, Numerics(world.temperature), scorer=world.scorer)
        groups, device = [group_of(record, index) for index, record in enumerate(drawn)], device_of(policy)
        reference = world.reference
        assert reference is not None
        reference.to(device)  # type: ignore[arg-type]  # a stub's overloads
        found: dict[int, list[Tensor]] = {}

        def valued(part: Sequence[Group]) -> tuple[Tensor, ...]:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                logp, values = module(part, temperature=world.temperature)
                reference_logp = completion_token_logprobs(reference, part, temperature=world.temperature)
            return logp.cpu(), values.cpu(), reference_logp.cpu()

        with torch.no_grad():
            for part, tensors in computed(valued, groups, token_budget=settings.token_budget):
                rows = zip(part, *tensors, strict=True)
                found |= {group.index: [part.clone() for part in parts] for group, *parts in rows}  # rows alone
        rewards = [torch.tensor(record.rewards, dtype=torch.float32) for record in drawn]
        return [
            Sampled(group, reward, *found[group.index]) for group, reward in zip(groups, rewards, strict=True)
        ], counts

    def _experience_of(self, groups: list[Group], sampled: list[Sampled]) -> Experience:
        import torch
        from torch.nn.functional import pad

        from exalign import objectives
        from exalign.data.batching import completion_token_mask
        from exalign.models.capability import device_of

        settings, device = self.settings, device_of(self.module)
        mask = completion_token_mask(groups).to(device)
        rewards = torch.stack([one.rewards for one in sampled]).to(device)
        logp, values, reference_logp = (
            torch.stack([pad(row, (0, mask.shape[2] - row.shape[1])) for row in rows]).to(device)
            for rows in zip(*((one.logp, one.values, one.reference_logp) for one in sampled), strict=True)
        )
        flat_mask, flat_values = mask.flatten(0, 1), values.flatten(0, 1)
        log_ratio = (logp - reference_logp).flatten(0, 1)
        beta = self.beta
        per_token = objectives.token_rewards(rewards.flatten(), log_ratio, flat_mask, beta=beta)
        advantages = objectives.generalised_advantages(
            per_token, flat_values, flat_mask, gamma=settings.gamma, lam=settings.lam
        )
        returns, tokens = advantages + flat_values, flat_mask.sum()
        numbers: dict[str, float | Tensor] = {
            "reward": rewards.mean(),
            "beta": beta,
            "kl": log_ratio.sum() / rewards.numel(),
            "entropy": -logp.sum() / tokens,
            "completion_tokens": tokens / rewards.numel(),
            "explained_variance": objectives.explained_variance(flat_values, returns, flat_mask),
        }
        return Experience(
            logp,
            values,
            objectives.whiten(advantages, flat_mask).view(mask.shape),
            returns.view(mask.shape),
            {name: float(value) for name, value in numbers.items()},
        )


def train_ppo(
    module: ActorCritic,
    tokenizer: PreTrainedTokenizerBase,
    world: Material,
    settings: PPO,
    folder: Path,
) -> Path:
    """Train the policy of `module`, and its critic with it; `loop.train` says what is written: the policy alone.

    The critic is trained on states of completions that the policy draws, and is kept in checkpoints only.
    Checkpoints stand between rollouts: `checkpoint_every` is rounded up to whole rollouts.
    """
    from exalign.training.loop import model_card, train
    from exalign.training.rollouts import RolloutCounts

    for problem in settings.sampling_problems(world.sampling):
        raise InputError(f"PPO {problem}.")
    plan = rollout_plan(settings)
    placed = settings.model_copy(update={"checkpoint_every": plan.whole_rollouts(settings.checkpoint_every)})
    card = model_card(
        "Policy trained by PPO",
        f"A language model trained by PPO with a KL penalty per token at τ = {world.temperature}.",
        settings,
        pipeline_tag="text-generation",
    )
    counted = RolloutCounts(Path(folder) / "rollouts.json")
    task = PPOTask(module, tokenizer, world, settings, counted.note)
    path = train(task, module, tokenizer, placed, folder, card=card)
    world.counts.update(counted.total(task.batches.num_rollouts))
    return path


def rollout_plan(settings: PPO) -> RolloutPlan:
    """How these settings turn rollouts into steps."""
    from exalign.training.rollouts import RolloutPlan

    return RolloutPlan(
        settings.rollout_prompts, settings.batch_prompts, settings.passes, settings.epochs, settings.seed
    )
