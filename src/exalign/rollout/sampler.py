"""What every sampler is: prompts in, the same prompts with K completions out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from exalign.data.record import Record


class Sampler(Protocol):
    """Draws completions from a policy.

    `sample` yields one record for each one it is given, in the same order, with `prompt_ids` and K completions
    that carry `text`, `token_ids`, `finish_reason` and `logprob`: log q(y|x) in nats of the distribution that was
    sampled from, summed over the tokens, the end-of-sequence token included exactly when it was drawn.
    """

    def sample(self, records: Iterable[Record]) -> Iterator[Record]: ...
