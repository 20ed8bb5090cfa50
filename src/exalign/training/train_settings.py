"""How a model is trained, whatever the task; which of it decides the result, and what a recovery may change."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from exalign.settings import NO_RESULT, STEP_SIZE, Choice, Settings, Size

Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(Settings):
    """How a model is trained, whatever the task."""

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW", json_schema_extra=STEP_SIZE)
    batch_prompts: int = Field(64, gt=0, description="prompts per optimizer step, over all processes")
    epochs: int = Field(1, gt=0, description="times each prompt is seen")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises linearly")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="how the rate falls after warm-up; linear and cosine fall towards 0"
    )
    adam_betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of weight matrices; biases and norms have none")
    max_grad_norm: float = Field(
        1.0, gt=0, description="gradients with a larger norm are scaled down to it", json_schema_extra=STEP_SIZE
    )
    token_budget: Size = Field(
        "auto",
        description="tokens per forward pass, memory and speed, never the result; auto: 2048 on a CPU, and what fits "
        "on an accelerator",
        json_schema_extra=NO_RESULT,
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: matrix products in bfloat16, weights as is")
    gradient_checkpointing: Choice = Field(
        "auto",
        description="recompute activations: less memory, about a third slower; auto: on an accelerator that needs it",
        json_schema_extra=NO_RESULT,
    )
    agreement_every: int | None = Field(
        None,
        gt=0,
        description="steps between two at which the gradients of the two halves of a step are compared, their cosine "
        "as gradient_agreement; it takes the memory of one gradient more; on one process only; null: never",
        json_schema_extra=NO_RESULT,
    )
    checkpoint_every: int = Field(
        100, gt=0, description="steps between checkpoints that an interrupted run needs", json_schema_extra=NO_RESULT
    )
    max_skipped_in_a_row: int = Field(
        10,
        gt=0,
        description="steps in a row whose loss or gradient is not finite, after which training stops",
        json_schema_extra=NO_RESULT,
    )
    save_policies: int = Field(1, gt=0, description="models saved, closer together at first, the final one included")
    seed: int = Field(0, ge=0, description="seeds the order of the prompts; a recipe adds its own seed to it")
    trackers: tuple[str, ...] = Field(
        (),
        description="trackers known to Accelerate: tensorboard (its files stand beside the metrics), wandb, trackio, …",
        json_schema_extra=NO_RESULT,
    )

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
