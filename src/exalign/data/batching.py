"""Groups of token ids, how whole groups fill a token budget, and in which order an epoch visits them.

Letters: `B` groups (prompts), `K` completions of one prompt (ragged: the largest K of the batch), `P` and `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from exalign.data.record import Record
from exalign.device import to_device


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One prompt with its K completions as token ids: what models see of a `Record`.

    Shapes: `prompt_ids` int64 `[P]`, P ≥ 1; `completion_ids` K tensors int64 `[T_i]`, T_i ≥ 1; the optional
    per-completion values float32 `[K]`, in nats where they are log-probabilities. `index` is the position in the
    source that the group came from: it addresses caches and labels, and names the row in messages. `weight` ≥ 0
    says how often the row counts in a loss.
    """

    index: int
    prompt_ids: Tensor
    completion_ids: tuple[Tensor, ...]
    rewards: Tensor | None = None
    preferred: int | None = None
    reference_logp: Tensor | None = None
    proposal_logp: Tensor | None = None
    weight: float = 1.0

    @property
    def num_completions(self) -> int:
        return len(self.completion_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the group with the prompt counted once."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.completion_ids)


def group_of(record: Record, index: int, *, from_proposal: bool = False) -> Group:
    """A record whose tokens are known, as a group: rewards, preference and log π_sft where it has them.

    With `from_proposal` its completions came from something else than π_sft, and their `logprob` is log q.
    """
    assert record.prompt_ids is not None

    def values(name: str) -> Tensor | None:
        found = [getattr(completion, name) for completion in record.completions]
        return None if not found or None in found else torch.tensor(found, dtype=torch.float32)

    return Group(
        index=index,
        prompt_ids=torch.tensor(record.prompt_ids),
        completion_ids=tuple(torch.tensor(completion.token_ids) for completion in record.completions),
        rewards=values("reward"),
        preferred=record.preferred,
        reference_logp=values("reference_logprob"),
        proposal_logp=values("logprob") if from_proposal else None,
        weight=1.0 if record.weight is None else record.weight,
    )


def microbatches(groups: Sequence[Group], *, token_budget: int) -> list[list[Group]]:
    """Split the groups of one step into micro-batches of whole groups with at most `token_budget` tokens each.

    First-fit decreasing: long groups are placed first, each into the first batch with room, so that few batches
    are needed. Which groups form a step is the caller's business and does not change. Inside a micro-batch
    the groups keep the order given, and micro-batches are ordered by their first group, so the result is a pure
    function of the input. A group over the budget stands alone.

    >>> def group(index, tokens):
    ...     return Group(index, torch.zeros(1, dtype=torch.long), (torch.zeros(tokens - 1, dtype=torch.long),))
    >>> groups = [group(i, n) for i, n in enumerate([6, 5, 4, 20, 3])]
    >>> [[g.index for g in batch] for batch in microbatches(groups, token_budget=10)]
    [[0, 2], [1, 4], [3]]
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, not {token_budget}")
    members: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(groups)), key=lambda p: (-groups[p].num_tokens, p)):
        tokens = groups[position].num_tokens
        bin_number = next((i for i, free in enumerate(room) if free >= tokens), None)
        if bin_number is None:
            members.append([position])
            room.append(token_budget - tokens)
        else:
            members[bin_number].append(position)
            room[bin_number] -= tokens
    return [[groups[p] for p in batch] for batch in sorted(sorted(batch) for batch in members)]


def completion_lengths(groups: Sequence[Group]) -> Tensor:
    """The tokens of every completion: int64 `[B, K]`, K the largest of the batch, 0 where there is no completion.

    >>> one, two = (Group(0, torch.ones(1), (torch.ones(3),) * k) for k in (1, 2))
    >>> completion_lengths([one, two]).tolist()
    [[3, 0], [3, 3]]
    """
    lengths = [torch.tensor([len(ids) for ids in group.completion_ids], dtype=torch.long) for group in groups]
    return pad_sequence(lengths, batch_first=True)


def completion_mask(groups: Sequence[Group]) -> Tensor:
    """Which of the K places hold a completion: bool `[B, K]`."""
    return completion_lengths(groups) > 0


def completion_token_mask(groups: Sequence[Group]) -> Tensor:
    """Which places hold a token of a completion: bool `[B, K, T]`, T the longest completion of the batch.

    >>> group = Group(0, torch.ones(1), (torch.ones(1), torch.ones(3)))
    >>> completion_token_mask([group]).tolist()
    [[[True, False, False], [True, True, True]]]
    """
    lengths = completion_lengths(groups)
    return torch.arange(int(lengths.max())) < lengths[..., None]


def stack_values(groups: Sequence[Group], name: Literal["rewards", "reference_logp", "proposal_logp"]) -> Tensor:
    """The per-completion values `name` of every group: float32 `[B, K]`, 0 where `completion_mask` is False.

    Raises `ValueError` naming the first group that lacks them or has another number of them than completions.
    """
    rows = []
    for group in groups:
        values = getattr(group, name)
        if values is None:
            raise ValueError(f"group {group.index} has no {name}")
        if values.shape != (group.num_completions,):
            raise ValueError(f"group {group.index} has {group.num_completions} completions but {name} {values.shape}")
        rows.append(values)
    return pad_sequence(rows, batch_first=True).to(torch.float32)


def stack_weights(groups: Sequence[Group]) -> Tensor:
    """The weight of every group: float32 `[B]`.

    A loss per group `[B]` is multiplied by them, and the weight of a step's loss is their sum (for a loss per token, of
    weight times tokens), so that a row of weight 2 counts as that row twice. A negative or infinite weight is a
    `ValueError`.

    >>> stack_weights([Group(0, torch.ones(1), ()), Group(1, torch.ones(1), (), weight=0.5)]).tolist()
    [1.0, 0.5]
    """
    for group in groups:
        if not 0 <= group.weight < float("inf"):
            raise ValueError(f"group {group.index} has the weight {group.weight}, which is no number from 0 upwards")
    return torch.tensor([group.weight for group in groups], dtype=torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class GroupValues:
    """What groups say of their completions, on one device: see the functions above; None what not every group has.

    `lengths` are the completions' tokens, int64 `[B, K]`, 0 where there is none; `preferred` their indices, int64
    `[B]`. `proposal_logp` is log π_sft where a group names no other proposal, and None where none does.
    """

    mask: Tensor
    weights: Tensor
    lengths: Tensor
    rewards: Tensor | None = None
    preferred: Tensor | None = None
    reference_logp: Tensor | None = None
    proposal_logp: Tensor | None = None
    more: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> Tensor:
        """The mean length of each group's completions, float32 `[B]`."""
        return self.lengths.sum(dim=1) / self.mask.sum(dim=1).clamp(min=1)


def values_of(groups: Sequence[Group], target: torch.device, *more: Tensor) -> GroupValues:
    """All of it, and `more` from the CPU, in one copy to `target`."""
    lengths = completion_lengths(groups)
    found = {"mask": lengths > 0, "weights": stack_weights(groups), "lengths": lengths}
    for name in ("rewards", "reference_logp"):
        if all(getattr(group, name) is not None for group in groups):
            found[name] = stack_values(groups, name)
    if all(group.preferred is not None for group in groups):
        found["preferred"] = torch.tensor([group.preferred for group in groups], dtype=torch.long)
    if any(group.proposal_logp is not None for group in groups):
        own = [g if g.proposal_logp is not None else replace(g, proposal_logp=g.reference_logp) for g in groups]
        found["proposal_logp"] = stack_values(own, "proposal_logp")
    there = to_device(target, *found.values(), *more)
    return GroupValues(**dict(zip(found, there, strict=False)), more=tuple(there[len(found) :]))


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` visits `n` groups: a permutation that depends on (n, seed, epoch) only.

    So a run that resumes in the middle of an epoch sees exactly what it would have seen.

    >>> epoch_order(5, seed=0, epoch=1) == epoch_order(5, seed=0, epoch=1), sorted(epoch_order(5, seed=0, epoch=1))
    (True, [0, 1, 2, 3, 4])
    """
    return [int(i) for i in np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)]
