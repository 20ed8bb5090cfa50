"""How completions are drawn."""

from __future__ import annotations

from pydantic import Field

from exalign.settings import Settings


class SampleSettings(Settings):
    """How completions are drawn. The temperature is not here: one τ per recipe serves every stage."""

    num_completions: int = Field(4, ge=1, description="K, the completions drawn for each prompt.")
    max_new_tokens: int = Field(
        64, ge=1, description="Longest completion in tokens; a completion that reaches it without ending is `length`."
    )
    max_prompt_tokens: int = Field(
        512, ge=1, description="Longest prompt in tokens; a longer one loses tokens on its left and is counted."
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep the most probable tokens up to this total probability at each step; none keeps all.",
    )
    top_k: int | None = Field(None, ge=1, description="Keep the k most probable tokens at each step; none keeps all.")
    batch_completions: int = Field(
        64, ge=1, description="Completions decoded at the same time; changes speed and memory, never a completion."
    )


class VLLMSettings(Settings):
    """vLLM as the engine that samples."""

    memory_share: float = Field(
        0.9, gt=0, le=1, description="share of a GPU's memory that weights and caches of the engine may take"
    )
    logprob_limit: float = Field(
        0.02,
        gt=0,
        description="nats per token: a log-probability of the engine that is further from the training path's is told",
    )
