"""Policy gradients as pure functions: PPO on tokens, and the methods whose baseline is a prompt's other completions.

| method | composed of |
|---|---|
| PPO | `token_rewards`, `generalised_advantages`, `whiten`; `clipped_policy_loss`, `clipped_value_loss` |
| RLOO | `leave_one_out_advantages` of `penalised_rewards`; `clipped_policy_loss` |
| GRPO | `group_mean_advantages`, `divided_by_spread`; `token_advantages`, `clipped_policy_loss`, `token_kl_penalty` |
| GSPO | the same advantages; `clipped_sequence_loss` |

PPO works on `[N, T]`: N sampled completions, T tokens, ragged under a mask; groups are `[B, K]`.

An action is a token, the state before it is everything to its left. The reward of a completion arrives with its last
token, and every token pays for leaving π_sft. `mask` is boolean, true on the real tokens, which come first in a row;
what stands in the other places reaches neither values nor gradients. What comes back is 0 on padding; losses come back
per token, to be summed and divided by the number of tokens. A wrong shape or type, padding before a real token where
order counts, or a parameter out of its range is a `ValueError`. Sources: Schulman et al. 2015 (arXiv 1506.02438,
generalised advantage estimation, "GAE") and 2017 (arXiv 1707.06347, PPO); the per-token penalty is that of Ziegler et
al. 2019.

>>> import torch
>>> mask = torch.tensor([[True, True, False]])
>>> rewards = token_rewards(torch.tensor([2.0]), torch.tensor([[0.5, 1.0, 9.0]]), mask, beta=0.1)
>>> rewards
tensor([[-0.0500,  1.9000,  0.0000]])
>>> generalised_advantages(rewards, torch.zeros(1, 3), mask, gamma=1.0, lam=1.0)  # what is still to come
tensor([[1.8500, 1.9000, 0.0000]])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exalign.objectives.estimators import group_spread
from exalign.objectives.masked import as_groups, check_not_negative, check_positive, masked_mean


def token_rewards(rewards: Tensor, log_ratio: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """`r_t = −β (log π(y_t|·) − log π_sft(y_t|·)) + [t is the last token] r(x, y)`.

    Their sum over a completion is `r(x, y) − β log(π(y|x)/π_sft(y|x))`, whose mean the alignment objective is (Eq. 4).

    `rewards` `[N]`, `log_ratio` `[N, T]` in nats, of the policy that the completions were drawn from → `[N, T]`;
    `beta` is β ≥ 0, reward per nat.
    """
    check_not_negative("beta", beta)
    (ratio,), live = as_groups({"log_ratio": log_ratio}, mask)
    _check_right_padded(live)
    if rewards.shape != ratio.shape[:1]:
        raise ValueError(f"rewards must be [{len(ratio)}], one per row of log_ratio, not {list(rewards.shape)}")
    last = live & ~torch.nn.functional.pad(live[:, 1:], (0, 1))
    return torch.where(last, rewards.to(ratio)[:, None], 0) - beta * ratio


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """`A_t = Σ_{l ≥ 0} (γλ)^l δ_{t+l}` with `δ_t = r_t + γ V_{t+1} − V_t`, V = 0 after the last token (2015, Eq. 16).

    λ = 1 gives the rewards to come less the value, unbiased; λ = 0 gives δ_t, which is as biased as the critic.
    The returns that a critic learns are `A_t + V_t`.

    `rewards` are r_t, as `token_rewards` gives them, `values` the critic's V_t of the state before token t, both
    `[N, T]` → `[N, T]` in units of reward; γ, the discount per token, and λ are in [0, 1].
    """
    for name, share in (("gamma", gamma), ("lam", lam)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {share}")
    (reward, value), live = as_groups({"rewards": rewards, "values": values}, mask)
    _check_right_padded(live)
    # Padding holds zeros now, so that an episode ends with its last token of itself.
    delta = reward + gamma * torch.nn.functional.pad(value[:, 1:], (0, 1)) - value
    advantages, running = torch.empty_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages


def whiten(values: Tensor, mask: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """`(v − mean) / √(variance + ε)` over all real tokens of the batch together; 0 on padding. `[N, T]` → `[N, T]`.

    The variance divides by the number of tokens.
    """
    (numbers,), live = as_groups({"values": values}, mask)
    count = live.sum().clamp(min=1)
    centred = torch.where(live, numbers - numbers.sum() / count, 0)
    return centred * torch.rsqrt(centred.square().sum() / count + epsilon)


def clipped_policy_loss(logp: Tensor, sampled_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip: float) -> Tensor:
    """`−min(ρ_t A_t, clamp(ρ_t, 1 − c, 1 + c) A_t)` with `ρ_t = exp(log π_θ(y_t) − log π_sampled(y_t))` (2017, Eq. 7).

    The gradient is `−A_t ρ_t ∂log π_θ`, and 0 where ρ has gone further than c in the direction that A asks for; at
    ρ = 1 it is that of the policy gradient.

    `logp` is log π_θ of each token, with gradient, `sampled_logp` that of the policy that the tokens were drawn from,
    `advantages` A_t: `[N, T]` each → `[N, T]` in units of the advantages; `clip` is c > 0.
    """
    check_positive("clip", clip)
    named = {"logp": logp, "sampled_logp": sampled_logp, "advantages": advantages}
    (policy, sampled, advantage), _ = as_groups(named, mask)
    ratio = (policy - sampled).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def is_clipped(logp: Tensor, sampled_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip: float) -> Tensor:
    """Bool `[N, T]`: the tokens whose gradient `clipped_policy_loss` cuts off. Arguments as there."""
    check_positive("clip", clip)
    named = {"logp": logp, "sampled_logp": sampled_logp, "advantages": advantages}
    (policy, sampled, advantage), live = as_groups(named, mask)
    ratio = (policy - sampled).exp()
    too_far = torch.where(advantage > 0, ratio > 1 + clip, (advantage < 0) & (ratio < 1 - clip))
    return live & too_far


def clipped_value_loss(values: Tensor, sampled_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float) -> Tensor:
    """`½ max((V − R)², (V' − R)²)` with `V' = V_old + clamp(V − V_old, −c, c)`, V_old the value at sampling time.

    The gradient is `V − R`, and 0 where V has moved towards R by more than c since the completions were drawn. It is
    the loss of OpenAI's implementation of PPO (baselines, ppo2); the paper has the square without the clip.

    `values` are V of the critic, with gradient, `sampled_values` V_old, `returns` R, the advantages (not whitened) plus
    V_old: `[N, T]` each → `[N, T]` in squared units of reward; `clip` is c > 0 in units of reward.
    """
    check_positive("clip", clip)
    named = {"values": values, "sampled_values": sampled_values, "returns": returns}
    (value, sampled, target), _ = as_groups(named, mask)
    near = sampled + (value - sampled).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - target).square(), (near - target).square())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """`1 − Var(R − V) / Var(R)` over all real tokens, a scalar; 1 for a perfect critic, 0 for a constant one.

    0 where the returns do not vary at all.
    """
    (value, target), live = as_groups({"values": values, "returns": returns}, mask)
    total, rest = target[live].var(correction=0), (target - value)[live].var(correction=0)
    return torch.where(total > 0, 1 - rest / total, 0.0)


def adapted_kl_coefficient(beta: float, kl: float, *, target: float, rate: float, clip: float = 0.2) -> float:
    """`β (1 + K clamp(KL/target − 1, −c, c))`: β of the next rollout, a proportional controller in log β.

    It is that of Ziegler et al. 2019 (arXiv 1909.08593, with K = 0.1 and c = 0.2): β rises while the policy is further
    from π_sft than `target`, and falls while it is nearer, by at most the share K c at a time.

    Args:
        beta: β ≥ 0 of the rollout that was drawn; 0 stays 0.
        kl: KL(π‖π_sft) of that rollout in nats per completion. An estimate may be negative; one that is not finite
            says nothing and leaves β as it is.
        target: the KL aimed at, above 0, in nats per completion.
        rate: K > 0, with K c < 1 so that β stays positive.
        clip: c > 0.

    >>> adapted_kl_coefficient(0.1, 6.6, target=6.0, rate=0.1)  # 10 % too far
    0.101
    """
    check_not_negative("beta", beta)
    for name, value in (("target", target), ("rate", rate), ("clip", clip)):
        check_positive(name, value)
    if rate * clip >= 1:
        raise ValueError(f"rate times clip must be below 1, not {rate * clip}")
    if not math.isfinite(kl):
        return beta
    return beta * (1 + rate * min(max(kl / target - 1, -clip), clip))


# Groups: K completions of a prompt, each the other's baseline. `[B, K]`, as everywhere else in `exalign.objectives`.


def penalised_rewards(
    rewards: Tensor, policy_logp: Tensor, reference_logp: Tensor, mask: Tensor | None = None, *, beta: float
) -> Tensor:
    """`R_i = r(x, y_i) − β (log π_θ(y_i|x) − log π_sft(y_i|x))`, without gradient. `[B, K]` → `[B, K]`, 0 where masked.

    Its mean over samples of π_θ is the alignment objective (Eq. 4). With completions drawn from π_θ itself (q = π_θ),
    β_π = 1 and β = β_r, the gradient of EXO over log π_θ(y_i) is `−(R_i − mean R) / (β_r K)`: that of RLOO with these
    rewards, divided by β_r, times (K−1)/K. `beta` is β ≥ 0.
    """
    check_not_negative("beta", beta)
    named = {"rewards": rewards, "policy_logp": policy_logp.detach(), "reference_logp": reference_logp}
    (reward, policy, reference), _ = as_groups(named, mask)
    return reward - beta * (policy - reference)


def group_mean_advantages(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """`A_i = r_i − mean_j r_j` (Shao et al. 2024, arXiv 2402.03300, GRPO without its division by the spread).

    `[B, K]` → `[B, K]` in units of reward, of mean 0 over a prompt's completions, 0 where masked. Its expected gradient
    is (K−1)/K of the policy gradient. Equal rewards, and a completion without rivals, have advantage 0: no gradient.
    """
    (reward,), live = as_groups({"rewards": rewards}, mask)
    # Measured from the highest, so that equal rewards are 0 exactly and no rounding is divided by their spread.
    below = reward - reward.masked_fill(~live, -math.inf).amax(dim=-1, keepdim=True)
    return torch.where(live, below - masked_mean(below, live)[:, None], 0)


def leave_one_out_advantages(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """`A_i = r_i − mean_{j ≠ i} r_j`, which is `K/(K−1) (r_i − mean r)` (RLOO).

    Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024 (arXiv 2402.14740).
    `[B, K]` → `[B, K]` in units of reward, of mean 0 over a prompt's completions, 0 where masked. The baseline does not
    know y_i, so the policy gradient is unbiased. A completion without rivals has no baseline and advantage 0: it has no
    gradient, and is no error, as ragged groups may hold one.
    """
    centred = group_mean_advantages(rewards, mask)
    count = torch.full_like(centred, centred.shape[1]) if mask is None else mask.sum(dim=-1, keepdim=True).to(centred)
    return centred * count / (count - 1).clamp(min=1)


def divided_by_spread(
    advantages: Tensor, rewards: Tensor, mask: Tensor | None = None, *, epsilon: float = 1e-4
) -> Tensor:
    """`A_i / (std_j r_j + ε)`: the scale of GRPO (2402.03300, §4.1.2), of any advantages. `[B, K]` → `[B, K]`, no unit.

    The standard deviation divides by K, as `group_spread` does; the paper does not say (TRL divides by K − 1). Equal
    rewards stay at 0. Prompts whose rewards hardly differ count as much as others after it: Liu et al. 2025 (arXiv
    2503.20783, "Dr. GRPO") leave it out for that reason. `epsilon` is ε > 0.
    """
    check_positive("epsilon", epsilon)
    (advantage, reward), live = as_groups({"advantages": advantages, "rewards": rewards}, mask)
    return advantage / (group_spread(reward, live)[:, None] + epsilon)


def token_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Each token has its completion's advantage, as in GRPO. `[N]` and mask `[N, T]` → `[N, T]`, 0 on padding."""
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages must be [{len(mask)}], one per row of mask, not {list(advantages.shape)}")
    return torch.where(mask, advantages[:, None], 0)


def clipped_sequence_loss(
    logp: Tensor, sampled_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
) -> Tensor:
    """`−min(s A, clamp(s, 1 − c, 1 + c) A)` with `s = exp(1/T Σ_t (log π_θ(y_t) − log π_sampled(y_t)))` (GSPO).

    Zheng et al. 2025 (arXiv 2507.18071, Eq. 5 and 7). The ratio is a completion's, the geometric mean of its tokens',
    so that a completion is clipped whole; per token it is `clipped_policy_loss` of `token_advantages`, as in GRPO. At
    ratio 1 the gradient over log π_θ(y_t) is `−A/T`. The paper's clips are about 3e-4: means move little.

    Arguments as of `clipped_policy_loss`, but `advantages` `[N]` → `[N]`, 0 for a row without tokens.
    """
    check_positive("clip", clip)
    (policy, sampled), live = as_groups({"logp": logp, "sampled_logp": sampled_logp}, mask)
    advantage = token_advantages(advantages.detach(), live)[:, 0].to(policy)
    ratio = masked_mean(policy - sampled, live).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def token_kl_penalty(logp: Tensor, reference_logp: Tensor, mask: Tensor) -> Tensor:
    """`exp(ℓ) − ℓ − 1` with `ℓ = log π_sft(y_t) − log π_θ(y_t)`: KL(π_θ‖π_sft) of a token (2402.03300, Eq. 4; GRPO).

    Never below 0, unlike −ℓ itself, and of the same mean over tokens drawn from π_θ. `[N, T]` → `[N, T]` nats, 0 on
    padding. It is differentiated as it stands there: the gradient, 1 − exp(ℓ) over log π_θ, is in the mean over tokens
    of π_θ that of KL(π_sft‖π_θ), the other direction.
    """
    (policy, reference), live = as_groups({"logp": logp, "reference_logp": reference_logp}, mask)
    difference = reference - policy
    return torch.where(live, difference.exp() - difference - 1, 0)


def _check_right_padded(live: Tensor) -> None:
    if bool((live[:, 1:] & ~live[:, :-1]).any()):
        raise ValueError("mask must be true on the first tokens of a row and false on the rest")
