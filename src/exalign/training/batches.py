"""Which groups a step sees, as a pure function of the seed and the step: a resumed run sees the same ones.

So are the prompts that a rollout is drawn for. A rollout is drawn from the weights at its first step, so a run that
resumes at such a step draws the same one again; the loop's checkpoints are therefore placed there (see
`whole_rollouts`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

from torch import Tensor

from exalign.data.batching import Group, epoch_order
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.processes import leads
from exalign.storage import fingerprint, read_sealed, write_sealed

_order = lru_cache(maxsize=4)(epoch_order)


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

    def __len__(self) -> int:
        return self.epochs * self._steps_per_epoch

    def __getitem__(self, step: int) -> list[Group]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        epoch, position = divmod(step, self._steps_per_epoch)
        order, start = _order(len(self.groups), self.seed, epoch), position * self.batch_prompts
        return [self.groups[i] for i in order[start : start + self.batch_prompts]]

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


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """How rollouts become steps: `rollout_prompts` prompts are sampled at a time and divided into minibatches of
    `batch_prompts`, which are gone through `passes` times; each prompt is sampled `epochs` times.
    """

    rollout_prompts: int
    batch_prompts: int
    passes: int
    epochs: int
    seed: int

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between one rollout and the next."""
        return self.passes * -(-self.rollout_prompts // self.batch_prompts)

    def whole_rollouts(self, steps: int) -> int:
        """`steps` rounded up to a multiple of the steps of a rollout."""
        return -(-steps // self.steps_per_rollout) * self.steps_per_rollout


class RolloutBatches:
    """Minibatches of rollouts. `draw(records, number)` samples rollout `number` (from 0) for these prompts.

    It returns one group per record, `index` its position among them. A prompt that comes again in a later epoch has
    another id (`ID@EPOCH`), so that it gets other samples. Reading the steps in order draws each rollout once;
    `step` is the one that was read last. `sampled_how` identifies the sampler in the fingerprint.

    >>> prompts = [Record(id=name, prompt=name) for name in "abcde"]
    >>> plan = RolloutPlan(rollout_prompts=4, batch_prompts=2, passes=2, epochs=2, seed=0)
    >>> def draw(records, number):
    ...     print("rollout", number, "of", len(records))
    ...     return [Group(index, None, ()) for index in range(len(records))]
    >>> batches = RolloutBatches(prompts, plan, draw)
    >>> [len(batches[step]) for step in range(len(batches))]
    rollout 0 of 4
    rollout 1 of 4
    rollout 2 of 2
    [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """

    def __init__(
        self,
        prompts: Sequence[Record],
        plan: RolloutPlan,
        draw: Callable[[list[Record], int], Sequence[Group]],
        *,
        sampled_how: str = "",
    ) -> None:
        if not prompts:
            raise InputError("There is nothing to train on: no prompt was left.")
        self._prompts = prompts
        self.plan = plan
        self._draw = draw
        self._sampled_how = sampled_how
        self.step = 0
        self._current: tuple[int, Sequence[Group]] | None = None

    def __len__(self) -> int:
        plan = self.plan
        whole, rest = divmod(len(self._prompts) * plan.epochs, plan.rollout_prompts)
        return whole * plan.steps_per_rollout + plan.passes * -(-rest // plan.batch_prompts)

    def __getitem__(self, step: int) -> list[Group]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        self.step = step
        plan = self.plan
        number, place = divmod(step, plan.steps_per_rollout)
        if self._current is None or self._current[0] != number:
            self._current = number, self._draw(self.prompts_of(number), number)
        groups = self._current[1]
        one_pass, minibatch = divmod(place, -(-len(groups) // plan.batch_prompts))
        order = _order(len(groups), plan.seed, number * plan.passes + one_pass)
        start = minibatch * plan.batch_prompts
        return [groups[index] for index in sorted(order[start : start + plan.batch_prompts])]

    @property
    def num_rollouts(self) -> int:
        return -(-len(self._prompts) * self.plan.epochs // self.plan.rollout_prompts)

    def prompts_of(self, number: int) -> list[Record]:
        """The prompts of rollout `number`: the next of all epochs' prompts in a row, each epoch in its own order."""
        plan, count, found = self.plan, len(self._prompts), []
        start = number * plan.rollout_prompts
        for place in range(start, min(start + plan.rollout_prompts, count * plan.epochs)):
            epoch, index = divmod(place, count)
            record = self._prompts[_order(count, plan.seed, epoch)[index]]
            found.append(replace(record, id=f"{record.id}@{epoch}"))
        return found

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._sampled_how.encode())
        for record in self._prompts:
            digest.update(fingerprint([record.id, record.prompt, record.prompt_ids]).encode())
        return digest.hexdigest()[:16]


class RolloutCounts:
    """What was counted while each rollout was drawn, in a file: one from before an interruption is not drawn again."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._by_rollout = read_sealed(path) if path is not None and path.exists() else {}

    def note(self, number: int, counts: Sequence[Counter[str]]) -> None:
        """Keep what the processes counted while they drew rollout `number`; the first of them writes it."""
        found: Counter[str] = Counter()
        for share in counts:
            found.update(share)
        self._by_rollout[str(number)] = dict(found)
        if leads() and self._path is not None:
            write_sealed(self._path, self._by_rollout)

    def total(self, num_rollouts: int) -> Counter[str]:
        """The sum over all rollouts; those whose counts are lost, with the file, are `rollouts_not_counted`."""
        found: Counter[str] = Counter()
        for number in range(num_rollouts):
            found.update(self._by_rollout.get(str(number), {"rollouts_not_counted": 1}))
        return found


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
