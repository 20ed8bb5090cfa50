"""PPO, the baseline: rollouts of the current policy, rewarded per token, and clipped steps of policy and critic.

The reward of a completion comes with its last token; every token pays β per nat by which the policy has left π_sft
there. Mathematics: `objectives.policy_gradient`. What differs from the paper's sources is said at `PPO`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from exalign.methods.method import Amount, Material, Method, TrainsOn
from exalign.methods.on_policy import OwnSamples, rows_of, token_places, train_on_own_samples, whole_only
from exalign.models.model_settings import ModelSettings
from exalign.rollout.settings import SampleSettings
from exalign.settings import STEP_SIZE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from exalign.data.batching import Group
    from exalign.models.heads import ActorCritic

MAX_KL_ERROR = 0.2
"""c: how far a rollout's KL counts as being from the target, as a share of it."""


class PPO(Method):
    """Policy and critic by clipped steps on rollouts of the policy, with a KL penalty per token.

    `epochs` counts how often each prompt is sampled. β is fixed unless `target_kl` is given. There is no entropy bonus,
    and no coefficient of the value loss: policy and critic share no weights, so each has a learning rate instead.
    `max_grad_norm` is of both together.
    """

    family: ClassVar[str] = "ppo"
    trains_on: ClassVar[TrainsOn] = "prompts"
    critic: ModelSettings | None = Field(
        None,
        description="the critic to start from, with the policy's tokenizer; null: this run's reward model where it "
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
        description="nats of KL per completion; after each rollout β rises if it was above, falls if below; null: β is "
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
    value_clip: float = Field(
        0.2, gt=0, description="how far a value may go in one rollout, in standard deviations of its rewards"
    )

    def rate_of(self, name: str) -> float:
        return self.critic_learning_rate / self.learning_rate if name.startswith("critic.") else 1.0

    @property
    def leaves_some_out(self) -> bool:
        return self.critic_steps > 0

    @property
    def idle_steps(self) -> int:
        return self.critic_steps

    @property
    def optimum_beta(self) -> float | None:
        return (self.beta or None) if self.target_kl is None else None

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
        if self.target_kl is None and self.changed("kl_rate"):
            yield "kl_rate has no effect without target_kl; remove it"
        if self.target_kl is not None and self.beta == 0:
            yield "beta = 0 can never change, whatever target_kl is; start from a beta above 0"

    def sampling_problems(self, sampling: SampleSettings) -> Iterator[str]:
        yield from whole_only(sampling)

    def train(self, material: Material, folder: Path) -> Path:
        from exalign.models.heads import ActorCritic
        from exalign.models.loading import load_reward_model

        critic = self.critic or material.critic
        assert critic is not None
        module = ActorCritic(material.policy, load_reward_model(critic, material.tokenizer))
        return train_ppo(module, material, self, folder)


class PPOTask:
    """The task: per token the clipped loss of the policy, in units of whitened advantages, plus that of the critic.

    The weight is the completion tokens. During the first `critic_steps` the loss is the critic's alone: the policy
    gets no gradient at all. Metrics `reward`, `beta`, `kl` (nats per completion, log π_θ − log π_sft), `entropy` (nats
    per token, estimated by −log π of the tokens drawn), `completion_tokens`, `value_clip` (in units of reward) and
    `explained_variance` are those of the rollout that the step belongs to; `policy_loss`, `value_loss` and
    `clip_fraction` of the step itself.
    """

    def __init__(self, module: ActorCritic, material: Material, settings: PPO, folder: Path | None = None) -> None:
        self.module, self.material, self.settings = module, material, settings
        module.kl_coefficient.fill_(settings.beta)
        self._experience: tuple[Tensor, ...] = ()
        self._numbers: dict[str, float] = {}
        self.own = OwnSamples(module, material, settings, folder, compute=self._valued, took=self._took)
        self.batches = self.own.batches

    @property
    def numbers(self) -> dict[str, float]:
        """What a step's row says of the rollout that it belongs to."""
        return self.own.numbers | self._numbers

    def weight(self, groups: Sequence[Group]) -> float:
        return sum(group.weight * len(ids) for group in groups for ids in group.completion_ids)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        from exalign import objectives
        from exalign.data.batching import stack_weights
        from exalign.device import to_device

        settings = self.settings
        logp, values = model(groups, temperature=self.material.temperature, critic_alone=self.critic_alone)
        mask, rows, weights = to_device(logp.device, *token_places(groups), stack_weights(groups))
        weights, mask = weights.repeat_interleave(mask.shape[1])[:, None], mask.flatten(0, 1)
        sampled_logp, sampled_values, advantages, returns = (
            rows_of(part, rows, logp).flatten(0, 1) for part in self._experience
        )
        ratio_of = (logp.flatten(0, 1), sampled_logp, advantages, mask)
        policy_loss = (weights * objectives.clipped_policy_loss(*ratio_of, clip=settings.clip)).sum()
        value_loss = objectives.clipped_value_loss(
            values.flatten(0, 1), sampled_values, returns, mask, clip=self._numbers["value_clip"]
        )
        value_loss = (weights * value_loss).sum()
        metrics = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "clip_fraction": (weights * objectives.is_clipped(*ratio_of, clip=settings.clip))
            .sum()
            .to(policy_loss.dtype),
        }
        return (value_loss if self.critic_alone else policy_loss + value_loss), metrics

    @property
    def critic_alone(self) -> bool:
        return self.batches.step < self.settings.critic_steps

    @property
    def beta(self) -> float:
        return self.settings.beta if self.settings.target_kl is None else self.module.kl_coefficient.item()

    def _took(self, groups: list[Group]) -> None:
        """Value a new rollout, and give β its value for the next one, which the checkpoint between them keeps.

        Until the policy has made a step its KL is 0 whatever β is, and β stays: a departure from the source.
        """
        from exalign import objectives

        settings = self.settings
        self._experience, self._numbers = self._experience_of(groups)
        if settings.target_kl is not None and self.batches.step > settings.critic_steps:
            adapted = objectives.adapted_kl_coefficient(
                self.beta, self._numbers["kl"], target=settings.target_kl, rate=settings.kl_rate, clip=MAX_KL_ERROR
            )
            self.module.kl_coefficient.fill_(adapted)

    def _valued(self, module: nn.Module, reference: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, ...]:
        from exalign.models.logprobs import completion_token_logprobs

        logp, values = module(groups, temperature=self.material.temperature)
        return completion_token_logprobs(reference, groups, temperature=self.material.temperature), logp, values

    def _experience_of(self, groups: list[Group]) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        """Of a rollout log π, values, advantages and returns `[R, K, T]`, 0 on padding; and its numbers."""
        from exalign import objectives
        from exalign.data.batching import completion_token_mask, stack_values

        settings, (reference_logp, logp, values) = self.settings, self.own.tokens
        mask, rewards = completion_token_mask(groups).to(logp.device), stack_values(groups, "rewards").to(logp.device)
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
            "value_clip": settings.value_clip * (float(rewards.std(correction=0)) or 1.0),
            "explained_variance": objectives.explained_variance(flat_values, returns, flat_mask),
        }
        whitened = objectives.whiten(advantages, flat_mask).view(mask.shape)
        told = {name: float(value) for name, value in numbers.items()}
        return (logp, values, whitened, returns.view(mask.shape)), told


def train_ppo(module: ActorCritic, material: Material, settings: PPO, folder: Path) -> Path:
    """Train the policy of `module`, and its critic with it; `loop.train` says what is written: the policy alone.

    The critic is trained on states of completions that the policy draws, and is kept in checkpoints only.
    """
    task = PPOTask(module, material, settings, folder)
    text = f"A language model trained by PPO with a KL penalty per token at τ = {material.temperature}."
    return train_on_own_samples(task, task.own, folder, title="Policy trained by PPO", text=text)
