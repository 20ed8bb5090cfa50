"""Own samples: a policy's completions as it is while it trains, with log q, log π_sft and rewards, as batches of steps.

Where a method draws `fresh_every` n, a rollout serves n optimizer steps: its completions come from the policy before
the first of them, q, and the objectives correct for how far π_θ has moved since. At n = 1 q = π_θ, and log q is what
the step itself computes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exalign.errors import InputError
from exalign.methods.method import Amount, Material, Method
from exalign.processes import gathered, in_order, share_of
from exalign.storage import fingerprint

if TYPE_CHECKING:
    from torch import Tensor, nn

    from exalign.data.batching import Group, GroupValues
    from exalign.data.record import Record
    from exalign.rollout.settings import SampleSettings
    from exalign.training.batches import RolloutPlan
    from exalign.training.loop import Task, Trainable

Compute = Callable[["nn.Module", "nn.Module", "Sequence[Group]"], "tuple[Tensor, ...]"]
"""Of a module, π_sft and groups: what a method keeps of every token, `[B, K, T]` each: log π_sft, then log q if any."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A prompt with its completions; `tokens` on the CPU, each `[K, T]` with T at least the longest completion.

    `gap` is the mean of |log q of the sampler − log q of the training path| in nats per token, None where the latter is
    not known yet or is another; `parts` are the means of each scorer of a list.
    """

    group: Group
    unfinished: int
    gap: float | None
    parts: dict[str, float]
    tokens: tuple[Tensor, ...] = ()


class OwnSamples:
    """The rollouts of a module's policy as it is, each process drawing its share; `batches` are the steps' groups.

    The groups have rewards, log π_sft and, as `proposal_logp`, log q; index i of a rollout is row i of `tokens`, what
    `compute` gives of every completion token, stacked to `[R, K, T]` on the device with 0 on padding. `took` is told of
    each new rollout. `numbers` say of it: `entropy`, nats per token, estimated by −log q of the tokens drawn; `reward`;
    `unfinished`, the share of completions cut at the limit; `equal_rewards`, the share of prompts whose completions all
    have the same reward, which teach nothing; `logprob_gap`, how far the sampler's log q is from the training path's,
    nats per token; `reward/NAME` of each scorer of a list. `drawing_seconds` and `scoring_seconds` are divided over the
    steps that it serves. Sharded weights are whole on every process while it is drawn.

    `at_once`: a rollout serves one step and comes from the whole distribution, so q is that step's π_θ. Nothing is
    computed for log q then: `proposal_logp` is the sampler's, for which `drawn_by` puts the step's own.
    """

    def __init__(
        self,
        module: Trainable,
        material: Material,
        settings: Method,
        folder: Path | None = None,
        *,
        compute: Compute | None = None,
        took: Callable[[list[Group]], None] = lambda groups: None,
    ) -> None:
        from exalign.training.batches import RolloutBatches, RolloutCounts
        from exalign.training.distributed import Whole

        self.whole = Whole(module)
        self.module, self.material, self.settings = module, material, settings
        self.counted = RolloutCounts(None if folder is None else Path(folder) / "rollouts.json")
        self.numbers: dict[str, float] = {}
        self.tokens: tuple[Tensor, ...] = ()
        self._compute, self._took = compute, took
        how = fingerprint([material.sampling.deciding(), material.temperature])
        self.batches = RolloutBatches(material.prompts, plan_of(settings), self._draw, sampled_how=how)
        self.whole_distribution = material.sampling.top_p is None and material.sampling.top_k is None
        self.at_once = self.whole_distribution and self.batches.plan.steps_per_rollout == 1

    def drawn_by(self, policy_logp: Tensor, given: GroupValues) -> GroupValues:
        """The values of a step's groups with log q `[B, K]` as the training path computes it."""
        return replace(given, proposal_logp=policy_logp.detach()) if self.at_once else given

    def correction(self, policy_logp: Tensor, given: GroupValues) -> dict[str, Tensor]:
        """What a step says of where its own samples came from, per prompt `[B]`, by the weights π_θ/q over the K.

        `kl` estimates KL(π_θ‖π_sft) and `kl_to_sampled` KL(π_θ‖q), in nats; `effective_samples`, from 1 to K, is how
        many samples of π_θ the K are worth; `reward_correlation`, of log π_θ/π_sft with the reward, is 1 for every
        optimum; `logprob_gap` as in `numbers`, where the step alone can say it.
        """
        from exalign import objectives

        policy, sampled, drawn = policy_logp.detach(), given.proposal_logp, self.drawn_by(policy_logp, given)
        reference, proposal = drawn.reference_logp, drawn.proposal_logp
        assert reference is not None and proposal is not None and sampled is not None and given.rewards is not None
        weights = objectives.log_importance_weights(policy, proposal, given.mask)
        found = {
            "kl": objectives.weighted_mean(weights, policy - reference, given.mask),
            "kl_to_sampled": objectives.weighted_mean(weights, policy - proposal, given.mask),
            "effective_samples": objectives.effective_sample_size(weights, given.mask),
            "reward_correlation": objectives.reward_correlation(policy, reference, given.rewards, given.mask),
        }
        if self.at_once:
            found["logprob_gap"] = ((sampled - policy).abs() / given.lengths).mean(dim=1)
        return found

    def _draw(self, records: list[Record], number: int) -> list[Group]:
        seed = int(fingerprint([self.settings.seed, "rollout", number]), 16) >> 1
        with self.whole.everywhere() as module:
            shares = gathered(self._share(module, share_of(records), seed))
        self.counted.note(number, [counts for _, counts, _ in shares])
        drawn = in_order([share for share, *_ in shares])
        groups = [replace(one.group, index=index) for index, one in enumerate(drawn)]
        self.tokens = self._stacked(groups, drawn)
        steps = self.batches.plan.passes * -(-len(groups) // self.batches.plan.batch_prompts)
        slowest = (max(seconds) / steps for seconds in zip(*(taken for *_, taken in shares), strict=True))
        self.numbers = _numbers(drawn) | dict(zip(("drawing_seconds", "scoring_seconds"), slowest, strict=True))
        self._took(groups)
        return groups

    def _share(
        self, module: Any, records: Sequence[Record], seed: int
    ) -> tuple[list[Drawn], Counter[str], tuple[float, float]]:
        """This process's prompts with their completions, what was counted, and the seconds of drawing and scoring."""
        from exalign.data.batching import group_of
        from exalign.data.record import logprob_gaps
        from exalign.models.capability import device_of, evaluating
        from exalign.rollout.rollout import Numerics, open_sampler, rollout, with_logprobs
        from exalign.rollout.scorers import part_means, scored

        material, settings, policy = self.material, self.settings, module.model
        counts: Counter[str] = Counter()
        if not records:
            return [], counts, (0.0, 0.0)
        reference, sampling = material.reference, material.sampling
        assert reference is not None and material.scorer is not None
        reference.to(device_of(policy))  # type: ignore[arg-type]  # a stub's overloads
        numerics = Numerics(material.temperature, settings.token_budget, settings.precision)
        begun = time.perf_counter()
        sampler = open_sampler(policy, material.tokenizer, sampling, temperature=material.temperature, seed=seed)
        with evaluating(policy):  # once: else every token's step puts every module in that mode and back
            found = sampled = rollout(records, sampler, counts, numerics)
        drawing = time.perf_counter() - begun
        # Drawn from the whole distribution, q is the policy itself, as the training path computes it.
        whole = self.whole_distribution
        if self._compute is None:
            found = with_logprobs(found, reference, "reference_logprob", numerics)
            found = with_logprobs(found, policy, "logprob", numerics) if whole and not self.at_once else found
        begun = time.perf_counter()
        found = scored(material.scorer, found, counts)
        taken = (drawing, time.perf_counter() - begun)
        groups = [group_of(record, index, from_proposal=True) for index, record in enumerate(found)]
        tokens = [()] * len(groups) if self._compute is None else self._by_token(module, reference, groups)
        drawn = []
        for record, group, row in zip(sampled, groups, tokens, strict=True):
            summed = (values.sum(-1) for values in row)
            known: dict[str, Any] = dict(zip(("reference_logp", "proposal_logp"), summed, strict=False))
            group = replace(group, **known)
            assert group.proposal_logp is not None
            cut = sum(completion.finish_reason == "length" for completion in record.completions)
            gaps = logprob_gaps([record], [group.proposal_logp.tolist()], truncated=False)
            told = whole and (len(row) > 1 or not self.at_once)
            parts = part_means([found[group.index]])
            drawn.append(Drawn(group, cut, sum(gaps) / len(gaps) if told else None, parts, row))
        return drawn, counts, taken

    def _by_token(self, module: nn.Module, reference: nn.Module, groups: list[Group]) -> list[tuple[Tensor, ...]]:
        import torch

        from exalign.models.capability import device_of
        from exalign.models.memory import computed
        from exalign.models.sizes import reading_budget

        assert self._compute is not None
        compute, device = self._compute, device_of(reference)
        found: dict[int, tuple[Tensor, ...]] = {}

        def work(part: Sequence[Group]) -> tuple[Tensor, ...]:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
                return tuple(tensor.cpu() for tensor in compute(module, reference, part))

        with torch.no_grad():
            budget = reading_budget(reference, self.settings.token_budget)
            for part, tensors in computed(work, groups, token_budget=budget):
                rows = zip(part, *tensors, strict=True)
                found |= {group.index: tuple(row.clone() for row in own) for group, *own in rows}  # rows alone
        return [found[group.index] for group in groups]

    def _stacked(self, groups: list[Group], drawn: Sequence[Drawn]) -> tuple[Tensor, ...]:
        import torch
        from torch.nn.functional import pad

        from exalign.models.capability import device_of

        longest = max(len(ids) for group in groups for ids in group.completion_ids)
        device = device_of(self.module)
        return tuple(
            torch.stack([pad(row, (0, longest - row.shape[1])) for row in rows]).to(device)
            for rows in zip(*(one.tokens for one in drawn), strict=True)
        )


def token_places(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """On the CPU: which places of `[B, K, T]` hold a token, and the rows of a rollout's tensors that are theirs."""
    import torch

    from exalign.data.batching import completion_token_mask

    return completion_token_mask(groups), torch.tensor([group.index for group in groups])


def rows_of(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """These rows, cut to the shape `[B, K, T]` of `like`."""
    return values[rows, : like.shape[1], : like.shape[2]]


def _numbers(drawn: Sequence[Drawn]) -> dict[str, float]:
    groups = [one.group for one in drawn]
    completions = sum(group.num_completions for group in groups)
    tokens = sum(len(ids) for group in groups for ids in group.completion_ids)
    rewards = [group.rewards for group in groups if group.rewards is not None]
    logq = [group.proposal_logp for group in groups if group.proposal_logp is not None]
    gaps = [one.gap for one in drawn if one.gap is not None]
    return {
        "reward": sum(float(row.sum()) for row in rewards) / completions,
        "entropy": -sum(float(row.sum()) for row in logq) / tokens,
        "unfinished": sum(one.unfinished for one in drawn) / completions,
        "equal_rewards": sum(bool((row == row[0]).all()) for row in rewards) / len(groups),
        **({"logprob_gap": sum(gaps) / len(gaps)} if gaps else {}),
        **{f"reward/{name}": sum(one.parts[name] for one in drawn) / len(drawn) for name in drawn[0].parts},
    }


def plan_of(settings: Method) -> RolloutPlan:
    """How the rollouts of a method that draws while it trains become steps, from how much it computes."""
    from exalign.training.batches import RolloutPlan

    amount = settings.amount
    assert amount.together is not None
    passes = amount.passes // amount.draws
    return RolloutPlan(amount.together, settings.batch_prompts, passes, amount.draws, settings.seed)


def own_amount(settings: Any) -> Amount:
    """How much a method computes whose rollouts serve `fresh_every` steps, gone through `passes` times."""
    together = settings.batch_prompts * settings.fresh_every // settings.passes
    return Amount(settings.epochs * settings.passes, draws=settings.epochs, together=together)


def drawn_how(fresh_every: int) -> str:
    return "on-policy" if fresh_every == 1 else f"own samples drawn every {fresh_every} steps"


def fresh_problems(settings: Any) -> Iterator[str]:
    """Sentences about `fresh_every` and `passes` that do not fit together."""
    if settings.fresh_every % settings.passes:
        yield f"fresh_every = {settings.fresh_every} steps are no whole number of passes; make it a multiple of passes"


def whole_only(sampling: SampleSettings) -> Iterator[str]:
    """A sentence where samples would be cut to their likely tokens, which no policy gradient holds for."""
    if sampling.top_p is not None or sampling.top_k is not None:
        yield "needs samples of the policy itself; remove sample.top_p and sample.top_k"


def train_on_own_samples(task: Task, own: OwnSamples, folder: Path, *, title: str, text: str) -> Path:
    """Train on rollouts; `loop.train` says what is written. `title` and `text` are the model card's.

    Checkpoints stand between rollouts: `checkpoint_every` is rounded up to whole ones, so that a run that goes on
    draws the rollout again from the weights it was drawn from. Rewards that are not finite are an `InputError`.
    """
    from exalign.training.loop import model_card, train

    material, plan, settings = own.material, own.batches.plan, own.settings
    for problem in settings.sampling_problems(material.sampling):
        raise InputError(f"{type(settings).__name__} {problem}.")
    placed = settings.model_copy(update={"checkpoint_every": plan.whole_rollouts(settings.checkpoint_every)})
    card = model_card(title, text, settings, pipeline_tag="text-generation")
    path = train(task, own.module, material.tokenizer, placed, folder, card=card)
    material.counts.update(own.counted.total(own.batches.num_rollouts))
    return path
