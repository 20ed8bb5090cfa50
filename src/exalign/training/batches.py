"""Which groups a step sees, as a pure function of the seed and the step: a resumed run sees the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from torch import Tensor

from exalign.data.batching import Group, epoch_order
from exalign.errors import InputError


class Batches(Protocol):
    """The batches of a run: one per optimizer step, addressed by the step (from 0)."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content they are drawn from; a checkpoint is continued only where it is the same."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> list[Group]: ...


class EpochBatches:
    """`batch_prompts` groups at a time, each group once per epoch, in an order that depends on (seed, epoch) alone.

    The last batch of an epoch holds what remains; its loss is normalised by its own weight.

    >>> import torch
    >>> one = torch.tensor([1])
    >>> batches = EpochBatches([Group(i, one, (one,)) for i in range(5)], batch_prompts=2, epochs=3, seed=0)
    >>> len(batches), [len(batches[step]) for step in range(3)]
    (9, [2, 2, 1])
    >>> sorted(group.index for step in (3, 4, 5) for group in batches[step])
    [0, 1, 2, 3, 4]
    """

    def __init__(self, groups: Sequence[Group], *, batch_prompts: int, epochs: int, seed: int) -> None:
        if not groups:
            raise InputError("There is nothing to train on: no row of the data was left.")
        self.groups = groups
        self.batch_prompts = batch_prompts
        self.epochs = epochs
        self.seed = seed
        self._steps_per_epoch = -(-len(groups) // batch_prompts)
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return self.epochs * self._steps_per_epoch

    def __getitem__(self, step: int) -> list[Group]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        epoch, position = divmod(step, self._steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.groups), self.seed, epoch)
        start = position * self.batch_prompts
        return [self.groups[i] for i in self._order[1][start : start + self.batch_prompts]]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for group in self.groups:
            values = (group.rewards, group.reference_logp, group.proposal_logp)
            for tensor in (group.prompt_ids, *group.completion_ids, *values):
                digest.update(tensor.numpy().tobytes() if isinstance(tensor, Tensor) else b"-")
                digest.update(b"|")
            weight = "" if group.weight == 1 else f" {group.weight!r}"
            digest.update(f"{group.index} {group.preferred}{weight}\n".encode())
        return digest.hexdigest()[:16]


def saved_steps(num_steps: int, count: int, *, idle: int = 0) -> list[int]:
    """The `count` steps, or all if they are fewer, after which a policy is saved: the last one, and squares before it.

    KL to the start grows fastest in the first steps, where a frontier of evenly spaced policies would have none. The
    first `idle` steps, which leave the policy as it is, are passed over.

    >>> saved_steps(24, 4), saved_steps(3, 5), saved_steps(24, 3, idle=8)
    ([2, 6, 14, 24], [1, 2, 3], [10, 16, 24])
    >>> [step for step in saved_steps(391, 20) if step <= 100]  # IMDB's epoch, for the paper's Figure 8
    [1, 4, 9, 16, 25, 36, 48, 63, 80, 98]
    """
    idle = min(idle, num_steps - 1)
    moving, steps = num_steps - idle, [0]
    count = min(count, moving)
    for index in range(1, count + 1):
        steps.append(max(steps[-1] + 1, -(-moving * index**2 // count**2)))
    return [idle + step for step in steps[1:]]
