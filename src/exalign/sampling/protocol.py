"""What every sampler is: prompts in, the same prompts with K completions out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from pydantic import Field

from exalign.data.records import Record
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


class Sampler(Protocol):
    """Draws completions from a policy.

    `sample` yields one record for each one it is given, in the same order, with `prompt_ids` and K completions
    that carry `text`, `token_ids`, `finish_reason` and `logprob`: log q(y|x) in nats of the distribution that was
    sampled from, summed over the tokens, the end-of-sequence token included exactly when it was drawn.
    """

    def sample(self, records: Iterable[Record]) -> Iterator[Record]: ...
