"""Evaluation records as arrays per prompt: what every number of the evidence is computed from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from exalign.data.reading import prompt_digest
from exalign.data.record import Completion, Prompt, Record
from exalign.errors import InputError
from exalign.evaluation.statistics import Array

Ragged = tuple[Array, ...]
"""One array per prompt, over that prompt's samples."""


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of one policy: per prompt, in the order of `ids`, arrays over its M_p ≥ 1 samples.

    `rewards` are NaN where no sample was scored. `log_ratios` (log π_θ − log π_sft, nats), `lengths` (tokens),
    `finished` (0 or 1) and `repeated` (the share of a sample's 4-grams of tokens that it had before) are None where the
    samples do not say. `parts` are the rewards of each scorer where the reward is a sum of several.
    `empty_prompts` had no sample and are left out. `characters` are those of the samples' texts. `more` are rewards of
    further samples of the same policy, by prompt: of π_sft those of the pool, which only its mean reward takes in.
    """

    ids: tuple[str, ...]
    rewards: Ragged
    log_ratios: Ragged | None
    lengths: Ragged | None
    finished: Ragged | None
    empty_prompts: int = 0
    repeated: Ragged | None = None
    parts: Mapping[str, Ragged] = field(default_factory=dict)
    characters: Ragged = ()
    more: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def scored(self) -> bool:
        return not any(np.isnan(values).any() for values in self.rewards)

    @property
    def mean_rewards(self) -> Array:
        """`[P]` means within each prompt, over all samples that are known of it."""
        known = zip(self.ids, self.rewards, strict=True)
        return prompt_means(tuple(np.concatenate([values, self.more.get(name, ())]) for name, values in known))

    @property
    def by_prompt(self) -> dict[str, Array]:
        """The rewards of each prompt's samples."""
        return dict(zip(self.ids, self.rewards, strict=True))

    def as_reference(self) -> SampleTable:
        """The same samples as those of π_sft itself, whose log-ratios are 0 by definition."""
        return replace(self, log_ratios=tuple(np.zeros(len(values)) for values in self.rewards))

    def at(self, ids: Sequence[str]) -> list[int]:
        position = {name: i for i, name in enumerate(self.ids)}
        return [position[name] for name in ids]


def tabulate(records: Iterable[Record], where: str) -> SampleTable:
    """Read samples; `where` names them in messages.

    A reward that only some samples lack or that is NaN or infinite, log-probabilities that only some have, and an id
    that occurs twice are an `InputError` that names the record.
    """
    given = list(records)
    if twice := [name for name, number in Counter(record.id for record in given).items() if number > 1]:
        raise InputError(f"{where}: the prompt {twice[0]!r} occurs twice; ids must be unique.")
    kept = [record for record in given if record.completions]
    return SampleTable(
        ids=tuple(record.id for record in kept),
        rewards=_rewards(kept, where),
        log_ratios=_log_ratios(kept, where),
        lengths=_where_all_say(kept, lambda c: None if c.token_ids is None else len(c.token_ids)),
        finished=_where_all_say(kept, lambda c: None if c.finish_reason is None else c.finish_reason == "stop"),
        empty_prompts=len(given) - len(kept),
        repeated=_where_all_say(kept, lambda c: None if c.token_ids is None else repeated_share(c.token_ids)),
        parts=_parts(kept),
        characters=tuple(np.array([len(completion.text) for completion in record.completions]) for record in kept),
    )


def _parts(records: Sequence[Record]) -> dict[str, Ragged]:
    """Of the parts that every sample has."""
    parts = [[completion.parts or {} for completion in record.completions] for record in records]
    names = [name for name in (parts[0][0] if parts else ()) if all(name in one for row in parts for one in row)]
    return {name: tuple(np.array([one[name] for one in row]) for row in parts) for name in names}


@dataclass(frozen=True, eq=False)
class PairTable:
    """Held-out preference pairs: per prompt `[P]` the means over its pairs, of which there are `sizes`.

    `preferred` is the log-ratio log π_θ − log π_sft (nats) of the preferred text, `rejected` that of the other (the
    mean, where there are several), `wins` the share of others it is above, a tie counting half.

    `undecided` pairs prefer neither and are left out.
    """

    preferred: Array
    rejected: Array
    wins: Array
    sizes: Array
    undecided: int = 0


@dataclass(frozen=True, eq=False)
class LabelTable:
    """Held-out answers with a label or reward each, `[N]`: the log-ratio log π_θ − log π_sft (nats), the label, and the
    number of the prompt, of which there are several answers at times. Two of unlike labels are a pair."""

    log_ratios: Array
    labels: Array
    prompts: NDArray[np.intp]


def tabulate_labels(records: Sequence[Record], where: str) -> LabelTable | None:
    """Read labelled answers with the log-probabilities of a policy; None where these have no two different labels."""
    ratios = np.array([_finite_log_ratios(record, where)[0] for record in records])
    labels = np.array([(record.rewards or [0.0])[0] for record in records])
    _, prompts = np.unique([prompt_digest(record) for record in records], return_inverse=True)
    return LabelTable(ratios, labels, prompts) if np.ptp(labels) > 0 else None


def tabulate_pairs(records: Iterable[Record], where: str) -> PairTable:
    """Read pairs with the log-probabilities of a policy; one without them is an `InputError`, as is no pair at all."""
    rows, prompts, undecided = [], list[bytes](), 0
    for record in records:
        if record.preferred is None or len(record.completions) < 2:
            undecided += 1
            continue
        ratios = _finite_log_ratios(record, where)
        better, others = ratios[record.preferred], np.delete(ratios, record.preferred)
        rows.append((better, others.mean(), ((better > others) + (better == others) / 2).mean()))
        prompts.append(prompt_digest(record))
    if not rows:
        raise InputError(f"{where}: none of its {undecided} pairs has a preferred text, so nothing can be measured.")
    _, prompt, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    preferred, rejected, wins = (np.bincount(prompt, values) / sizes for values in np.array(rows, dtype=np.float64).T)
    return PairTable(preferred, rejected, wins, sizes.astype(np.float64), undecided)


def repeated_share(token_ids: Sequence[int], n: int = 4) -> float:
    """The share of n-grams that occurred before in the same text; 0 where there is none.

    >>> repeated_share([1, 2, 3, 4, 1, 2, 3, 4]), repeated_share([1, 2])
    (0.2, 0.0)
    """
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def render_prompt(prompt: Prompt) -> str:
    """A prompt as plain text: chat messages one after the other, each under its role.

    >>> print(render_prompt(({"role": "user", "content": "Hi"},)))
    [user]
    Hi
    """
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message.get('role')}]\n{message.get('content')}" for message in prompt)


def prompt_means(ragged: Ragged) -> Array:
    """`[P]` means within each prompt."""
    return np.array([values.mean() for values in ragged])


def common_prompts(tables: Iterable[SampleTable]) -> list[str]:
    """The ids that every table has, in the order of the first."""
    first, *others = tables
    shared = set(first.ids).intersection(*(table.ids for table in others))
    return [name for name in first.ids if name in shared]


def log_ratio(completion: Completion) -> float | None:
    """log π_θ(y|x) − log π_sft(y|x) in nats, or None where one of them is not recorded."""
    if completion.logprob is None or completion.reference_logprob is None:
        return None
    return completion.logprob - completion.reference_logprob


def _rewards(records: list[Record], where: str) -> Ragged:
    """All NaN where nothing was scored."""
    if all(completion.reward is None for record in records for completion in record.completions):
        return tuple(np.full(len(record.completions), np.nan) for record in records)
    for record in records:
        for reward in (completion.reward for completion in record.completions):
            if reward is None or not math.isfinite(reward):
                raise InputError(f"{where}: a completion of {record.id!r} has reward {reward}; score it again.")
    return tuple(np.array([c.reward for c in record.completions], dtype=np.float64) for record in records)


def _log_ratios(records: list[Record], where: str) -> Ragged | None:
    if all(log_ratio(completion) is None for record in records for completion in record.completions):
        return None
    return tuple(_finite_log_ratios(record, where) for record in records)


def _finite_log_ratios(record: Record, where: str) -> Array:
    values = [log_ratio(completion) for completion in record.completions]
    if any(value is None or not math.isfinite(value) for value in values):
        raise InputError(
            f"{where}: a completion of {record.id!r} lacks a finite logprob or reference_logprob; evaluate again."
        )
    return np.array(values, dtype=np.float64)


def _where_all_say(records: list[Record], read: Callable[[Completion], float | None]) -> Ragged | None:
    columns = [[read(c) for c in record.completions] for record in records]
    if not columns or any(value is None for column in columns for value in column):
        return None
    return tuple(np.array(column, dtype=np.float64) for column in columns)
