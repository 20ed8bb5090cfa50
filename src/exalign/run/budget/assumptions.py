"""What a plan takes for granted; each assumption is a setting, and the plan prints all of them."""

from __future__ import annotations

from pydantic import Field

from exalign.settings import Settings


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
    bandwidth_share: float = Field(
        0.5, gt=0, le=1, description="share of the memory bandwidth that a step of sampling reaches"
    )
    memory_share: float = Field(
        0.9, gt=0, le=1, description="share of the memory that tensors may take; the rest is context and fragments"
    )
    launch: float = Field(
        5.0, ge=0, description="microseconds to start one operation: small steps of sampling cannot be faster"
    )
    network: float = Field(50.0, gt=0, description="GB/s from each device to others, where a node of 8 is left")
    gflops: float | None = Field(None, gt=0, description="cpu only: peak GFLOP/s of matrix products (exalign bench)")
    memory: float | None = Field(None, gt=0, description="cpu only: GB of memory; default: this machine's")
    bandwidth: float = Field(20.0, gt=0, description="cpu only: GB/s of its memory")
