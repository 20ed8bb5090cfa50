"""The one record that flows through the pipeline: a prompt with its K completions.

SFT data is K = 1, a preference pair K = 2 with `preferred`, rollouts K = 4…128 with rewards once they are scored,
evaluation samples M = 4. K may differ between records.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exalign.errors import InputError

Prompt = str | tuple[dict[str, Any], ...]
"""Plain text, or chat messages: each a dict with the texts `role` and `content`, and what else the chat template is to
see of it: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`."""


def spoken(message: Mapping[str, Any]) -> str:
    """The text of a message for who reads no template, each call of a tool on a line of its own.

    >>> spoken({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]})
    'add({})'
    """
    lines, calls = [message["content"]] if message["content"] else [], message.get("tool_calls") or ()
    for call in calls if isinstance(calls, Sequence) and not isinstance(calls, str) else (calls,):
        inner = call.get("function", call) if isinstance(call, Mapping) else {"name": call}
        given = inner.get("arguments") or {}
        told = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        lines.append(f"{inner.get('name')}({told})")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a prompt.

    `token_ids` are the ids that were sampled (never re-tokenised text), the end-of-sequence id included
    exactly when the sampler produced it. `logprob` is log q(y|x) under the proposal that was sampled from, at its
    temperature, summed over tokens; `reference_logprob` is log π_sft(y|x) at the recipe's temperature; both in nats.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None
    """`stop` (ended by the end-of-sequence token), `length` (cut by the limit), or None where unknown."""
    logprob: float | None = None
    reference_logprob: float | None = None
    reward: float | None = None
    parts: dict[str, float] | None = None
    """What each scorer of a weighted sum gave, without its weight."""


@dataclass(frozen=True, slots=True)
class Record:
    """A prompt with its K ≥ 1 completions (K = 0 for a prompt that is still to be sampled).

    `id` is stable and unique within a file. `preferred` is the index of the completion that won, where one did.
    `weight` is the record's weight in the loss (None: 1), `tools` what the chat template is told, a JSON list as text.
    `columns` are those of the row that nothing else was made of: what reward functions may ask for.
    """

    id: str
    prompt: Prompt
    completions: tuple[Completion, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    preferred: int | None = None
    weight: float | None = None
    tools: str | None = None
    columns: dict[str, Any] | None = None

    @property
    def rewards(self) -> list[float] | None:
        """The K rewards, or None unless every completion has one."""
        values = [completion.reward for completion in self.completions]
        return None if not values or any(value is None for value in values) else values  # type: ignore[return-value]

    def as_texts(self) -> Record:
        """This record without what one tokenizer and one model said of its texts."""
        bare = (replace(one, token_ids=None, logprob=None, reference_logprob=None) for one in self.completions)
        return replace(self, prompt_ids=None, completions=tuple(bare))

    def with_rewards(self, rewards: Iterable[float]) -> Record:
        """This record with its K rewards set."""
        return self.with_each("reward", map(float, rewards))

    def with_each(self, name: str, values: Iterable[Any]) -> Record:
        """This record with one more value of its K completions."""
        pairs = zip(self.completions, values, strict=True)
        return replace(self, completions=tuple(replace(completion, **{name: value}) for completion, value in pairs))


def pairs_from_rewards(records: Iterable[Record], counts: Counter[str]) -> Iterator[Record]:
    """Pairs of samples of one prompt, the one with the higher reward preferred (the paper's preference data).

    The K samples of a record are taken two by two as they stand, (1, 2), (3, 4), …: disjoint pairs of independent
    samples, as when each pair had been drawn for itself. Taking the best against the worst instead would change the
    distribution that the preferences come from. Counted: `pairs`, and what is dropped, `pairs_tied` (equal
    rewards) and `samples_without_partner` (K odd). Ids are those of the records, with `#2`, `#3`, … for further
    pairs. A record without rewards, or with one that is not finite, is an `InputError` that names it.

    >>> scored = Record("7", "Hi", tuple(Completion(t, reward=r) for t, r in [("a", 0.0), ("b", 2.0), ("c", 1.0)]))
    >>> [(p.id, [c.text for c in p.completions], p.preferred) for p in pairs_from_rewards([scored], Counter())]
    [('7', ['a', 'b'], 1)]
    """
    for record in records:
        rewards = record.rewards
        if rewards is None or not all(math.isfinite(reward) for reward in rewards):
            raise InputError(f"Record {record.id} has no finite reward for each completion: score the records first.")
        if len(rewards) % 2:
            counts["samples_without_partner"] += 1
        for first in range(0, len(rewards) - 1, 2):
            left, right = rewards[first : first + 2]
            if left == right:
                counts["pairs_tied"] += 1
                continue
            counts["pairs"] += 1
            yield replace(
                record,
                id=record.id if first == 0 else f"{record.id}#{first // 2 + 1}",
                completions=record.completions[first : first + 2],
                preferred=0 if left > right else 1,
            )


def logprob_gaps(records: Sequence[Record], values: Sequence[Sequence[float]], *, truncated: bool) -> list[float]:
    """|log q(y|x) − log π(y|x)| / T of every completion, in nats per token; `values` are the log π.

    Where the draw was `truncated` to the most probable tokens, log q may be above log π by any amount, and only what it
    is below counts.

    >>> record = Record("a", "Hi", (Completion("b c", (1, 2), "length", -3.0),))
    >>> logprob_gaps([record], [[-3.5]], truncated=False), logprob_gaps([record], [[-3.5]], truncated=True)
    ([0.25], [0.0])
    """
    gaps = []
    for record, row in zip(records, values, strict=True):
        for completion, value in zip(record.completions, row, strict=True):
            assert completion.logprob is not None and completion.token_ids
            gap = (completion.logprob - value) / len(completion.token_ids)
            gaps.append(max(-gap, 0.0) if truncated else abs(gap))
    return gaps
