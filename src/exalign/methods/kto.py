"""KTO: every completion by itself, desirable or not: `λ_y (1 − σ(±β (h − z)))`, h the log-ratio to π_sft.

Ethayarajh et al. 2024 (arXiv 2402.01306, §4). Rows are one completion and its label (`data.rewards`: prompt,
completion, label), K completions with rewards, or pairs, of which each side is a row. Mathematics:
`objectives.contrastive`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from exalign.errors import InputError
from exalign.methods.contrastive import Contrastive, ContrastiveTask
from exalign.methods.matching import log_ratio_metrics, with_reference_logp
from exalign.methods.method import Amount, Material, TrainsOn
from exalign.processes import gathered, in_order, share_of

if TYPE_CHECKING:
    from torch import Tensor

    from exalign.data.batching import Group, GroupValues
    from exalign.models.logprobs import PackedPolicy
    from exalign.training.batches import EpochBatches


class KTO(Contrastive):
    """Makes desirable completions likelier than π_sft has them and others less so, each judged by itself."""

    target: Literal["preference", "reward"] = Field(
        "preference",
        description="what completions are judged by: preference, the preferred one of each pair is the desirable one; "
        "reward, those with a reward or a label above desirable_above are, one completion to a row or several",
    )
    beta: float = Field(0.1, gt=0, description="β: scale of the log-ratio")
    desirable_above: float = Field(0.5, description="rewards above this are desirable; labels are 0 and 1")
    desirable_weight: float = Field(1.0, gt=0, description="λ_D: weight of desirable completions")
    undesirable_weight: float = Field(1.0, gt=0, description="λ_U: of the others; the paper balances the two by number")

    @property
    def trains_on(self) -> TrainsOn:
        return "preferences" if self.target == "preference" else "rewards"

    @property
    def line(self) -> str:
        weights = f"λ_D {self.desirable_weight:g}, λ_U {self.undesirable_weight:g}"
        return f"KTO, {self.target} target, β {self.beta:g}, {weights}"

    @property
    def amount(self) -> Amount:
        """Completions of other prompts are read once under π_sft, and before every step."""
        return Amount(self.epochs, reads=self.epochs + 1)

    def desirable(self, given: GroupValues) -> Tensor:
        """Bool `[B, K]`."""
        import torch

        if self.target == "reward":
            assert given.rewards is not None
            return given.rewards > self.desirable_above
        assert given.preferred is not None
        return torch.arange(given.mask.shape[1], device=given.mask.device) == given.preferred[:, None]

    def losses(self, logp: Tensor, given: GroupValues, kl: float = 0.0) -> Tensor:
        from exalign import objectives

        assert given.reference_logp is not None
        return objectives.kto_loss(
            logp,
            given.reference_logp,
            self.desirable(given),
            logp.new_tensor(kl),
            given.mask,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )

    def problems(self) -> Iterator[str]:
        if self.target == "preference" and self.changed("desirable_above"):
            yield "desirable_above has no effect on a preference target; remove it"
        if self.stop_after is not None:
            yield "stop_after compares losses, and KTO's depends on the step it is measured after; remove it"

    @property
    def fewest(self) -> int:
        return 1 if self.target == "reward" else 2

    def task_of(self, module: PackedPolicy, material: Material) -> Callable[[EpochBatches], ContrastiveTask]:
        if self.target == "reward":
            self._check_labels(material.groups)
        return lambda batches: KTOTask(
            UnrelatedBatches(batches, module, material, self), settings=self, temperature=material.temperature
        )

    def _check_labels(self, groups: Sequence[Group]) -> None:
        rewards = [reward for group in groups if group.rewards is not None for reward in group.rewards.tolist()]
        above = {reward > self.desirable_above for reward in rewards}
        if len(above) < 2:
            raise InputError(
                f"KTO: every completion is {'' if above == {True} else 'un'}desirable, all rewards are on one side of "
                f"desirable_above = {self.desirable_above:g}; set it between those of good and of bad completions."
            )


@dataclass(frozen=True)
class KTOTask(ContrastiveTask):
    """KTO's losses with the z of the step."""

    batches: UnrelatedBatches
    settings: KTO

    def losses(self, logp: Tensor, given: GroupValues) -> Tensor:
        return self.settings.losses(logp, given, self.batches.kl)

    def metrics(self, logp: Tensor, given: GroupValues) -> dict[str, Tensor]:
        """Also z in nats, and the share of completions on their label's side of it."""
        assert given.reference_logp is not None
        z, mask = max(0.0, self.batches.kl), given.mask
        right = (logp - given.reference_logp > z) == self.settings.desirable(given)
        found = log_ratio_metrics(given, logp, pairs=self.settings.target == "preference")
        share = (right & mask).sum(dim=1) / mask.sum(dim=1)
        return found | {"unrelated_kl": logp.new_full((len(logp),), z), "right_side": share}


class UnrelatedBatches:
    """Batches, and of the last one taken z = `kl`: the mean log-ratio of completions that belong to other prompts,
    each row with its weight.

    As in the paper, a prompt is put before the completions of the next row that has another one. Their log π_sft is
    computed here, before the first step. z is a function of the step's rows and the policy before it: neither the token
    budget nor the number of processes changes it.
    """

    def __init__(self, batches: EpochBatches, module: PackedPolicy, material: Material, settings: KTO) -> None:
        from exalign.device import device
        from exalign.rollout.rollout import Numerics
        from exalign.training.distributed import Whole

        self._batches, self._whole, self.kl = batches, Whole(module), 0.0
        self._numerics = Numerics(material.temperature, settings.token_budget, settings.precision)
        module.to(device())
        groups = unrelated_to(batches.groups)
        groups = with_reference_logp(module, groups, settings, temperature=material.temperature)
        self._unrelated = {id(own): other for own, other in zip(batches.groups, groups, strict=True)}

    @property
    def fingerprint(self) -> str:
        return self._batches.fingerprint

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> list[Group]:
        from exalign.rollout.rollout import logprobs_of

        groups = self._batches[step]
        share = share_of([self._unrelated[id(group)] for group in groups])
        with self._whole.everywhere() as module:
            found = logprobs_of(share, module, self._numerics)
        reference = [group.reference_logp for group in share if group.reference_logp is not None]
        ratios = [(logp - before).tolist() for logp, before in zip(found, reference, strict=True)]
        each = zip(groups, in_order(gathered(ratios)), strict=True)
        rows = [(ratio, group.weight) for group, row in each for ratio in row if group.weight]
        self.kl = fmean(*zip(*rows, strict=True)) if rows else 0.0
        return groups


def unrelated_to(groups: Sequence[Group]) -> list[Group]:
    """Each prompt with the completions of the next row that has another prompt, the first after the last."""
    prompts = [tuple(group.prompt_ids.tolist()) for group in groups]
    if len(set(prompts)) < 2:
        raise InputError("KTO compares with completions of other prompts, and all rows have the same prompt.")
    others = []
    for place, prompt in enumerate(prompts):
        following = ((place + step) % len(groups) for step in range(1, len(groups)))
        others.append(groups[next(other for other in following if prompts[other] != prompt)])
    return [
        replace(group, completion_ids=other.completion_ids, rewards=None, preferred=None, reference_logp=None)
        for group, other in zip(groups, others, strict=True)
    ]
