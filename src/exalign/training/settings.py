"""How a model is trained, for every task; which of it decides the result, and what a recovery may change."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exalign.settings import Settings

WITHOUT_EFFECT_ON_RESULTS = {
    "token_budget",
    "gradient_checkpointing",
    "checkpoint_every",
    "trackers",
    "max_skipped_in_a_row",
}
"""Settings of memory, speed, bookkeeping, and when to give up: they may change while a training is interrupted."""
ADJUSTABLE = ("learning_rate", "critic_learning_rate", "max_grad_norm")
"""Settings that a recovery may change: how far a step goes, not what it is made from."""
MAX_KL_ERROR = 0.2
"""c: how far a rollout's KL counts as being from the target, as a share of it."""


class TrainSettings(Settings):
    """How a model is trained, whatever the task."""

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    batch_prompts: int = Field(64, gt=0, description="prompts per optimizer step, over all processes")
    epochs: int = Field(1, gt=0, description="times each prompt is seen")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises linearly")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="how the rate falls after warm-up; linear and cosine fall towards 0"
    )
    adam_betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of weight matrices; biases and norms have none")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients with a larger norm are scaled down to it")
    token_budget: int = Field(4096, gt=0, description="tokens per forward pass: memory and speed, never the result")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: matrix products in bfloat16, weights as is")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about a third slower")
    checkpoint_every: int = Field(100, gt=0, description="steps between checkpoints that an interrupted run needs")
    max_skipped_in_a_row: int = Field(
        10, gt=0, description="steps in a row whose loss or gradient is not finite, after which training stops"
    )
    save_policies: int = Field(1, gt=0, description="models saved, closer together at first, the final one included")
    seed: int = Field(0, ge=0, description="seeds the order of the prompts; a recipe adds its own seed to it")
    trackers: tuple[str, ...] = Field((), description="trackers known to Accelerate: tensorboard, wandb, trackio, …")

    def rate_of(self, name: str) -> float:
        """What the learning rate is multiplied with for the parameter of this name; a task with parts overrides it."""
        return 1.0

    @property
    def leaves_some_out(self) -> bool:
        """Whether in some steps a trained parameter gets no gradient; a task with parts overrides it."""
        return False

    @property
    def idle_steps(self) -> int:
        """How many steps at the start leave the policy as it is; a task with parts overrides it."""
        return 0


class SFTSettings(TrainSettings):
    """How the supervised policy π_sft is trained."""

    train_on_prompts: bool = Field(
        False, description="learn the prompts' tokens too, as a model from scratch must; else completions alone"
    )


class RewardModelSettings(TrainSettings):
    """How the reward model is trained."""


class ClassifierSettings(TrainSettings):
    """How the classifier is trained."""


class AlignSettings(TrainSettings):
    """How a policy is aligned: which divergence to which target."""

    learning_rate: float = Field(1e-6, gt=0, description="peak learning rate of AdamW")
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "jeffreys", "alpha"] = Field(
        "reverse_kl", description="what is minimised: reverse_kl is EXO, forward_kl is DPO"
    )
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


class PPOSettings(TrainSettings):
    """How a policy is trained by PPO. `epochs` counts how often each prompt is sampled.

    β is fixed unless `target_kl` is given. There is no entropy bonus, and no coefficient of the value loss: policy and
    critic share no weights, so each has a learning rate instead. `max_grad_norm` is of both together.
    """

    learning_rate: float = Field(1e-6, gt=0, description="peak learning rate of the policy's AdamW")
    critic_learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of the critic's AdamW")
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
