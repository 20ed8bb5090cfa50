"""On-policy sampling as batches: completions of the policy as it is when a step comes that needs new ones.

Which prompts a rollout is drawn for and which of its groups a step sees are functions of (seed, step). A rollout is
drawn from the weights at its first step, so a run that resumes at such a step draws the same one again; the loop's
checkpoints are therefore placed there (see `whole_rollouts`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exalign.data.batching import Group, epoch_order
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.processes import leads
from exalign.storage import fingerprint, read_sealed, write_sealed


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
        order = epoch_order(len(groups), plan.seed, number * plan.passes + one_pass)
        start = minibatch * plan.batch_prompts
        return [groups[index] for index in sorted(order[start : start + plan.batch_prompts])]

    @property
    def num_rollouts(self) -> int:
        return -(-len(self._prompts) * self.plan.epochs // self.plan.rollout_prompts)

    def prompts_of(self, number: int) -> list[Record]:
        """The prompts of rollout `number`: the next of all epochs' prompts in a row, each epoch in its own order."""
        plan, count, found = self.plan, len(self._prompts), []
        orders: dict[int, list[int]] = {}
        start = number * plan.rollout_prompts
        for place in range(start, min(start + plan.rollout_prompts, count * plan.epochs)):
            epoch, index = divmod(place, count)
            if epoch not in orders:
                orders[epoch] = epoch_order(count, plan.seed, epoch)
            record = self._prompts[orders[epoch][index]]
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
