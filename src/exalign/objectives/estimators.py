"""What K samples per prompt say about a policy: KL, importance weights, the optimum that they show.

Nothing here is trained on; `policy_logp` and the like are numbers. `[B, K]` in, `[B]` out, nats, `mask` true where
a sample exists, as everywhere in `exalign.objectives`. A prompt without samples gets 0: leave it out of averages.

Which samples an estimator needs is part of its meaning: `kl_estimate` averages over samples of **π_θ**,
`optimal_frontier` over samples of **π_sft**.

`optimal_frontier` draws the best that any method could do. π*_β is π_sft reweighted by exp(r/β), so samples of π_sft
with their rewards are enough to estimate its reward and its KL for every β at once:

>>> rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
>>> frontier = optimal_frontier(rewards, torch.tensor([1e6, 1.0, 1e-2]))
>>> for reward, kl, ess in zip(frontier.reward[0], frontier.kl[0], frontier.effective_samples[0]):
...     print(f"reward {reward:.3f} at KL {kl:.3f}, worth {ess:.2f} samples")
reward 1.500 at KL 0.000, worth 4.00 samples
reward 2.493 at KL 0.439, worth 2.09 samples
reward 3.000 at KL 1.386, worth 1.00 samples
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exalign.objectives.divergences import reverse_kl
from exalign.objectives.masked import as_groups, masked_log_softmax, masked_mean, weighted_sum
from exalign.objectives.matching import log_reward_target


def kl_estimate(policy_logp: Tensor, reference_logp: Tensor, mask: Tensor | None = None) -> Tensor:
    """`KL(π_θ‖π_sft) ≈ mean_i (log π_θ(y_i|x) − log π_sft(y_i|x))`, y_i ~ π_θ. Unbiased; a sample may be below 0."""
    (policy, reference), live = as_groups({"policy_logp": policy_logp, "reference_logp": reference_logp}, mask)
    return masked_mean(policy - reference, live)


def log_importance_weights(target_logp: Tensor, proposal_logp: Tensor, mask: Tensor | None = None) -> Tensor:
    """Self-normalised log-weights `log softmax_i (log target(y_i) − log q(y_i))`, y_i ~ q. `[B, K]` → `[B, K]`.

    The target need not be normalised. Those of π*_β for samples of π_sft are `log_reward_target(rewards, beta_r=β)`.
    """
    (target, proposal), live = as_groups({"target_logp": target_logp, "proposal_logp": proposal_logp}, mask)
    return masked_log_softmax(target - proposal, live)


def effective_sample_size(log_weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """`1 / Σ_i w_i²`: how many equal weights the self-normalised `log_weights` are worth. `[B, K]` → `[B]`.

    From 1, one sample carries everything, to the number of samples, all weigh the same.
    """
    (weights,), live = as_groups({"log_weights": log_weights}, mask)
    squares = weighted_sum(2 * weights, torch.ones_like(weights), live)
    return torch.where(live.any(dim=-1), 1 / squares.clamp(min=torch.finfo(squares.dtype).tiny), 0)


def weighted_mean(log_weights: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """`Σ_i w_i v_i` for normalised log-weights, such as the policy's distribution and rewards. `[B, K]` → `[B]`."""
    (weights, numbers), live = as_groups({"log_weights": log_weights, "values": values}, mask)
    return weighted_sum(weights, numbers, live)


def group_spread(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Standard deviation over each prompt's completions (dividing by their number). `[B, K]` → `[B]`.

    At π_θ = π_sft the gradient of EXO over a prompt's log-probabilities has length
    `β_π/√K · group_spread(rewards)/β_r`: this spread over β_r sets the size of the first steps.
    """
    (numbers,), live = as_groups({"values": values}, mask)
    centred = numbers - masked_mean(numbers, live)[:, None]
    return masked_mean(centred.square(), live).sqrt()


def reward_correlation(
    policy_logp: Tensor, reference_logp: Tensor, rewards: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Correlation of `log π_θ/π_sft` with the reward over each prompt's completions. `[B, K]` → `[B]` in [−1, 1].

    It is 1 for every optimum π*_β, whose log-ratio is `r/β − log Z`: below 1, nats of KL buy less reward than they
    could. A prompt whose log-ratios or rewards do not differ, as before the first step, has none and gets 0.
    """
    named = {"policy_logp": policy_logp, "reference_logp": reference_logp, "rewards": rewards}
    (policy, reference, reward), live = as_groups(named, mask)
    ratio = policy - reference
    spreads = group_spread(ratio, live) * group_spread(reward, live)
    centred = [torch.where(live, values - masked_mean(values, live)[:, None], 0) for values in (ratio, reward)]
    covariance = masked_mean(centred[0] * centred[1], live)
    # Of equal numbers rounding leaves a spread of about ε times their size.
    sizes = [torch.where(live, values, 0).abs().amax(dim=-1) for values in (ratio, reward)]
    varied = spreads > 8 * torch.finfo(ratio.dtype).eps * sizes[0] * sizes[1]
    return torch.where(varied, covariance / torch.where(varied, spreads, 1), 0).clamp(-1, 1)


def saturated(log_p_policy: Tensor, log_p_target: Tensor, mask: Tensor | None = None, *, ratio: float = 0.01) -> Tensor:
    """`[B]` bool: prompts that the reverse KL no longer corrects although the policy is far off.

    Far off: total variation `½ Σ|p − t|` above ½. No longer corrects: the gradient of `reverse_kl` over the log-ratios
    is shorter (in sum of absolute values) than `ratio` times that of `forward_kl`. For a preference pair with ε = 1e-3
    and the default ratio that is a log-ratio of the loser more than 7.3 above the winner's.
    """
    (log_p, log_t), live = as_groups({"log_p_policy": log_p_policy, "log_p_target": log_p_target}, mask)
    live = live & ~torch.isneginf(log_p) & ~torch.isneginf(log_t)
    p, t = log_p.exp(), log_t.exp()
    surprise = torch.where(live, log_p - log_t, 0)
    mean = weighted_sum(log_p, surprise, live)[:, None]
    reverse = torch.where(live, p * (surprise - mean), 0).abs().sum(dim=-1)
    forward = torch.where(live, p - t, 0).abs().sum(dim=-1)
    return (forward > 1) & (reverse < ratio * forward)


@dataclass(frozen=True, slots=True, eq=False)
class OptimalFrontier:
    """Reward against KL of the optimum π*_β, for a grid of β, per prompt: `[P, G]` each, for intervals over prompts.

    Attributes:
        betas: `[G]`.
        reward: expected reward of π*_β.
        kl: KL(π*_β‖π_sft), nats; it cannot exceed log N, so points near that bound say "at least".
        effective_samples: how many of the N samples carry the estimate; near 1 it is not to be trusted.
    """

    betas: Tensor
    reward: Tensor
    kl: Tensor
    effective_samples: Tensor


def optimal_frontier(
    rewards: Tensor, betas: Tensor, mask: Tensor | None = None, *, judged: Tensor | None = None
) -> OptimalFrontier:
    """Estimate reward and KL(π*_β‖π_sft) for every β from samples of π_sft.

    With `w = softmax(r/β)` over a prompt's N samples: reward `Σ w r`, KL `Σ w log(N w)`, which equals
    `Σ w r / β − log Z_β`. Self-normalised importance sampling: consistent, biased by O(1/N) towards π_sft.

    Args:
        rewards: `[P, N]` rewards of N samples of π_sft for each of P prompts.
        betas: `[G]` floating, each above 0.
        mask: `[P, N]` bool, true where a sample exists; all do by default.
        judged: `[P, N]` another reward of the same samples, whose mean under π*_β is then the reward: what the optimum
            of a learned reward has by a better judge.

    Raises:
        ValueError: wrong shape or type, a β not above 0, no prompt, or a prompt without samples.
    """
    (reward, seen), live = as_groups({"rewards": rewards, "judged": rewards if judged is None else judged}, mask)
    if betas.ndim != 1 or not betas.is_floating_point():
        raise ValueError(f"betas must be floating [G], not {betas.dtype} {list(betas.shape)}")
    if len(reward) == 0 or not bool(live.any(dim=-1).all()):
        raise ValueError("every prompt needs at least one sample, and there must be a prompt")
    log_count = live.sum(dim=-1).to(reward.dtype).log()
    columns: list[tuple[Tensor, ...]] = []
    for beta in betas.tolist():
        log_w = log_reward_target(reward, beta_r=beta, mask=live)
        # Against the uniform distribution over the samples, whose log-probability is −log N.
        kl = reverse_kl(log_w, (-log_count)[:, None].expand_as(log_w), live)
        columns.append((weighted_mean(log_w, seen, live), kl, effective_sample_size(log_w, live)))
    mean, kl, ess = (torch.stack(column, dim=-1) for column in zip(*columns, strict=True))
    return OptimalFrontier(betas=betas, reward=mean, kl=kl, effective_samples=ess)
