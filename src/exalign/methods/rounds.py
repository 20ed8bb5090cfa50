"""Alignment in rounds: sample from the policy as it is, score, align, and again.

The prompts are dealt into `AlignSettings.rounds` parts. The completions of a part come from the policy q that the
round starts with, so both distributions over the K are corrected for it: `p_f ∝ exp(β_π log π_θ + (1 − β_π) log π_sft
− log q)`, `p_r ∝ exp(log π_sft + r/β_r − log q)`. The target therefore stays the optimum around π_sft, however far q
has gone; without the correction each round would aim at the optimum around the last one. Not in the paper, whose only
round is the first: there q = π_sft, and both lines are Eqs. 12 and 14.

As many completions are scored as in one round over the same prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.batching import Group, group_of
from exalign.data.record import Record
from exalign.data.store import Header, read_header, read_records, write_records
from exalign.errors import InputError
from exalign.methods.matching import Align, check_groups, with_reference_logp
from exalign.methods.ppo import Surroundings
from exalign.models.logprobs import PackedPolicy
from exalign.processes import several
from exalign.rollout.sampler import GroupedSampler
from exalign.rollout.scorers import scored
from exalign.storage import fingerprint
from exalign.training.loop import model_card, train
from exalign.training.rollouts import RolloutBatches, RolloutPlan
from exalign.training.settings import AlignSettings


def train_rounds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: Surroundings,
    settings: AlignSettings,
    folder: Path,
) -> Path:
    """Align a policy in rounds on its own samples; `loop.train` says what is written, and the samples stay.

    `epochs` counts how often each round's samples are seen. Round r is kept as records in `rollouts/round-NNN`, so an
    interrupted run does not draw it again.
    """
    if several():
        raise InputError("rounds above 1 run in a single process; start it without accelerate launch or torchrun.")
    if settings.target != "reward":
        raise InputError("rounds above 1 need target 'reward': preferences are not made while training.")
    if len(world.prompts) < settings.rounds:
        raise InputError(f"rounds is {settings.rounds}, but there are {len(world.prompts)} prompts to deal into them.")
    part = -(-len(world.prompts) // settings.rounds)
    plan = RolloutPlan(part, settings.batch_prompts, passes=settings.epochs, epochs=1, seed=settings.seed)
    rounds = _Rounds(model, tokenizer, world, settings, Path(folder) / "rollouts")
    how = fingerprint([world.sampling.model_dump(exclude={"batch_completions"}), world.temperature])
    batches = RolloutBatches(world.prompts, plan, rounds.draw, sampled_how=how)
    card = model_card(
        "Aligned policy",
        f"A language model aligned by {settings.divergence} in {settings.rounds} rounds at τ = {world.temperature}.",
        settings,
        pipeline_tag="text-generation",
    )
    task = Align(batches, settings, world.temperature)
    path = train(task, PackedPolicy(model), tokenizer, settings, folder, card=card)
    for number in range(settings.rounds):
        drawn = rounds.path(number)
        if drawn.exists():  # the last rounds are empty where the prompts do not fill them
            world.counts.update(read_header(drawn).counts)
    return path


@dataclass(frozen=True, slots=True)
class _Rounds:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    world: Surroundings
    settings: AlignSettings
    folder: Path

    def path(self, number: int) -> Path:
        return self.folder / f"round-{number:03d}"

    def draw(self, records: list[Record], number: int) -> list[Group]:
        """The groups of a round: read where they stand, else sampled from the policy as it is now, and scored."""
        path = self.path(number)
        if not (path / "header.json").exists():
            counts: Counter[str] = Counter()
            drawn = self._drawn(records, number, counts)
            header = Header(temperature=self.world.temperature, seed=self.settings.seed, counts=dict(counts))
            write_records(path, drawn, header)
        groups = [group_of(record, index, from_proposal=True) for index, record in enumerate(read_records(path))]
        check_groups(groups, self.settings)
        return groups

    def _drawn(self, records: Sequence[Record], number: int, counts: Counter[str]) -> list[Record]:
        world, settings = self.world, self.settings
        seed = int(fingerprint([settings.seed, "round", number]), 16) >> 1
        sampler = GroupedSampler(self.model, self.tokenizer, world.sampling, temperature=world.temperature, seed=seed)
        drawn = list(sampler.sample(records))
        counts.update(sampler.counts)
        groups = [group_of(record, index) for index, record in enumerate(drawn)]
        device = next(self.model.parameters()).device
        world.reference.to(device)  # type: ignore[arg-type]  # a stub's overloads
        reference = with_reference_logp(world.reference, groups, settings, temperature=world.temperature)
        whole = world.sampling.top_p is None and world.sampling.top_k is None
        # Drawn from the whole distribution, q is the policy itself, as the training path computes it.
        proposal = with_reference_logp(self.model, groups, settings, temperature=world.temperature) if whole else None
        return [
            _with_logprobs(record, reference[index], None if proposal is None else proposal[index])
            for index, record in enumerate(scored(world.scorer, drawn, counts))
        ]


def _with_logprobs(record: Record, reference: Group, proposal: Group | None) -> Record:
    assert reference.reference_logp is not None
    drawn = [completion.logprob for completion in record.completions]
    logprobs = drawn if proposal is None else _values(proposal)
    rows = zip(record.completions, logprobs, _values(reference), strict=True)
    return replace(record, completions=tuple(replace(c, logprob=q, reference_logprob=ref) for c, q, ref in rows))


def _values(group: Group) -> list[float]:
    assert isinstance(group.reference_logp, torch.Tensor)
    return group.reference_logp.tolist()
