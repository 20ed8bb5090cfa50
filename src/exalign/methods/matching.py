"""Alignment: the policy's distribution over the K completions of a prompt is moved onto a target's.

EXO is reverse KL, DPO is forward KL, each with a target from rewards or from a preference (Eqs. 7, 15, 18, 19).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group, completion_mask, stack_preferred, stack_values
from exalign.errors import InputError
from exalign.models.logprobs import PackedPolicy, completion_logprobs, reference_logprobs
from exalign.objectives import (
    alpha_divergence,
    forward_kl,
    group_spread,
    jeffreys,
    jensen_shannon,
    log_importance_weights,
    log_policy_distribution,
    log_preference_target,
    log_reward_target,
    reverse_kl,
    saturated,
    weighted_mean,
)
from exalign.training.batches import Batches, EpochBatches
from exalign.training.loop import model_card, train
from exalign.training.settings import AlignSettings

DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jensen_shannon": jensen_shannon,
    "jeffreys": jeffreys,
    "alpha": alpha_divergence,
}


def distance_of(settings: AlignSettings) -> Callable[..., Tensor]:
    """The divergence as a function of `log_p_policy`, `log_p_target` and a mask."""
    chosen = DIVERGENCES[settings.divergence]
    return partial(chosen, alpha=settings.alpha) if chosen is alpha_divergence else chosen


@dataclass(frozen=True, slots=True)
class Align:
    """D(p_f, p_r) per prompt, in nats; the weight is the prompts."""

    batches: Batches
    settings: AlignSettings
    temperature: float

    def weight(self, groups: Sequence[Group]) -> float:
        return len(groups)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        policy_logp = completion_logprobs(model, groups, temperature=self.temperature)
        device = policy_logp.device
        mask = completion_mask(groups).to(device)
        reference_logp = stack_values(groups, "reference_logp").to(device)
        proposal_logp = _proposal_logp(groups, device)
        log_p_policy = log_policy_distribution(
            policy_logp, reference_logp, beta_pi=self.settings.beta_pi, mask=mask, proposal_logp=proposal_logp
        )
        log_p_target = self._log_target(groups, mask, reference_logp, proposal_logp)
        loss = distance_of(self.settings)(log_p_policy, log_p_target, mask)
        with torch.no_grad():
            sampled_from = reference_logp if proposal_logp is None else proposal_logp
            log_weights = log_importance_weights(policy_logp, sampled_from, mask)
            reference_weights = log_importance_weights(reference_logp, sampled_from, mask)
            log_ratio = policy_logp - reference_logp
            metrics = {
                # KL(π_θ‖π_sft) with both self-normalised over the K: between 0 and log K, so low where it is large.
                "kl": reverse_kl(log_weights, reference_weights, mask),
                "log_ratio_spread": group_spread(log_ratio, mask),
                "saturated": saturated(log_p_policy, log_p_target, mask).to(loss.dtype),
                "completion_tokens": _completion_lengths(groups).to(loss),
            }
            if all(group.rewards is not None for group in groups):
                rewards = stack_values(groups, "rewards").to(device)
                metrics["reward"] = weighted_mean(log_weights, rewards, mask)
                metrics["reward_spread"] = group_spread(rewards, mask) / self.settings.beta_r
        return loss.sum(), {name: value.sum() for name, value in metrics.items()}

    def _log_target(
        self, groups: Sequence[Group], mask: Tensor, reference_logp: Tensor, proposal_logp: Tensor | None
    ) -> Tensor:
        settings, device = self.settings, mask.device
        if settings.target == "preference":
            preferred = stack_preferred(groups).to(device)
            return log_preference_target(preferred, num_completions=mask.shape[1], epsilon=settings.epsilon, mask=mask)
        return log_reward_target(
            stack_values(groups, "rewards").to(device),
            beta_r=settings.beta_r,
            mask=mask,
            reference_logp=None if proposal_logp is None else reference_logp,
            proposal_logp=proposal_logp,
        )


def train_align(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    settings: AlignSettings,
    folder: Path,
    *,
    temperature: float,
) -> Path:
    """Align a policy on groups with `reference_logp` and rewards or a preference; `loop.train` says what is written.

    `temperature` is the recipe's τ, under which the reference log-probabilities were computed.
    """
    check_groups(groups, settings)
    batches = EpochBatches(groups, batch_prompts=settings.batch_prompts, epochs=settings.epochs, seed=settings.seed)
    card = model_card(
        "Aligned policy",
        f"A language model aligned by {settings.divergence} to a {settings.target} target at τ = {temperature}.",
        settings,
        pipeline_tag="text-generation",
    )
    return train(Align(batches, settings, temperature), PackedPolicy(model), tokenizer, settings, folder, card=card)


def with_reference_logp(
    model: nn.Module, groups: Sequence[Group], settings: AlignSettings, *, temperature: float
) -> list[Group]:
    """The groups with log π(y|x) under `model`, the policy before alignment, as `reference_logp`.

    The same code, packing budget and precision as in training, so that every log-ratio starts at 0.
    """
    device, filled = next(model.parameters()).device, []
    for start in range(0, len(groups), settings.batch_prompts):
        part = groups[start : start + settings.batch_prompts]
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            found = reference_logprobs(model, part, temperature=temperature, token_budget=settings.token_budget)
        filled += [replace(group, reference_logp=logp) for group, logp in zip(part, found, strict=True)]
    return filled


def check_groups(groups: Sequence[Group], settings: AlignSettings) -> None:
    """Raise an `InputError` that names the first row which lacks what the settings need."""
    for group in groups:
        if group.num_completions < 2:
            raise InputError(f"Row {group.index} has one completion; alignment compares at least two.")
        if group.reference_logp is None:
            raise InputError(
                f"Row {group.index} has no reference_logp, log π_sft(y|x); fill it in with `with_reference_logp`."
            )
        if settings.target == "preference" and group.preferred is None:
            raise InputError(f"Row {group.index} has no preferred completion, which target 'preference' needs.")
        if settings.target == "reward" and group.rewards is None:
            raise InputError(f"Row {group.index} has no rewards, which target 'reward' needs.")
        for name in ("rewards", "reference_logp", "proposal_logp"):
            values = getattr(group, name)
            if values is not None and not bool(values.isfinite().all()):
                raise InputError(f"Row {group.index} has a value in {name} that is not finite.")


def _proposal_logp(groups: Sequence[Group], device: torch.device) -> Tensor | None:
    """log q `[B, K]` where completions came from another proposal than π_sft, else None: then q = π_sft cancels."""
    if all(group.proposal_logp is None for group in groups):
        return None
    known = [
        replace(group, proposal_logp=group.reference_logp) if group.proposal_logp is None else group for group in groups
    ]
    return stack_values(known, "proposal_logp").to(device)


def _completion_lengths(groups: Sequence[Group]) -> Tensor:
    """Mean completion length per prompt, in tokens `[B]`."""
    return torch.tensor([sum(map(len, group.completion_ids)) / group.num_completions for group in groups])
