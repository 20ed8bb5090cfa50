"""The two distributions over K completions that alignment matches.

Aligning a language model means pulling its policy towards the optimum of the alignment objective (Eq. 4, 5),
`π*_β(y|x) ∝ π_sft(y|x) exp(r(x,y)/β)`. That optimum cannot be normalised over all texts, but it can over the K
completions at hand. So each prompt gets two distributions over its completions `y_1 … y_K`:

* the **policy's**, from the log-ratios `f_i = β_π (log π_θ(y_i|x) − log π_sft(y_i|x))` (Eq. 12, 13);
* the **target's**, from rewards (Eq. 14) or from a preference (Eq. 18).

A divergence between the two (`exalign.objectives.divergences`) is a training loss. EXO is the reverse
Kullback–Leibler divergence, DPO the forward one:

>>> import torch
>>> policy_logp = torch.tensor([[-9.0, -7.0, -8.0]], requires_grad=True)
>>> reference_logp = torch.tensor([[-8.5, -7.5, -8.0]])
>>> rewards = torch.tensor([[0.3, -0.1, 0.2]])
>>> log_p_policy = log_policy_distribution(policy_logp, reference_logp, beta_pi=0.5)
>>> log_p_target = log_reward_target(rewards, beta_r=0.5)
>>> from exalign.objectives import forward_kl, reverse_kl
>>> exo = reverse_kl(log_p_policy, log_p_target)
>>> print(f"EXO {exo.item():.4f}, DPO {forward_kl(log_p_policy, log_p_target).item():.4f}")
EXO 0.1415, DPO 1.1800

Shapes: `B` prompts, `K` completions. All log-probabilities are sums over a completion's tokens, in nats. Fewer than
K completions are marked by `mask` (true = exists); see `exalign.objectives.masked` for what that means exactly.
All results are float32, or float64 where an input is.

Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment", arXiv 2402.00856v2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exalign.objectives.masked import as_groups, check_fraction, check_mask, check_positive, masked_log_softmax


def log_policy_distribution(
    policy_logp: Tensor,
    reference_logp: Tensor,
    *,
    beta_pi: float,
    mask: Tensor | None = None,
    proposal_logp: Tensor | None = None,
) -> Tensor:
    """Log of the policy's distribution over the completions of each prompt (Eq. 12, 13).

    `p_f = softmax_i β_π (log π_θ(y_i|x) − log π_sft(y_i|x))`: the self-normalised importance weights of
    `π_θ^{β_π} π_sft^{1−β_π}` (Eq. 9) for completions sampled from π_sft.

    Beyond the paper: completions from another proposal q, say an earlier policy, need q's log-probabilities,
    and then `p_f ∝ exp(β_π log π_θ + (1 − β_π) log π_sft − log q)`. With q = π_sft nothing changes.

    Args:
        policy_logp: `[B, K]` log π_θ(y_i|x); the gradient flows through it.
        reference_logp: `[B, K]` log π_sft(y_i|x).
        beta_pi: β_π > 0, how strongly the log-ratio counts.
        mask: `[B, K]` bool, true where a completion exists; all do by default.
        proposal_logp: `[B, K]` log q(y_i|x); π_sft by default.

    Returns:
        `[B, K]` log p_f, −inf where there is no completion.

    Raises:
        ValueError: wrong shape or type, or β_π not above 0.
    """
    check_positive("beta_pi", beta_pi)
    sampled_from = reference_logp if proposal_logp is None else proposal_logp
    values = {"policy_logp": policy_logp, "reference_logp": reference_logp, "proposal_logp": sampled_from}
    (policy, reference, proposal), live = as_groups(values, mask)
    return masked_log_softmax(beta_pi * (policy - reference) + (reference - proposal), live)


def log_reward_target(
    rewards: Tensor,
    *,
    beta_r: float,
    mask: Tensor | None = None,
    reference_logp: Tensor | None = None,
    proposal_logp: Tensor | None = None,
) -> Tensor:
    """Log of the target distribution that rewards define (Eq. 14).

    `p_r = softmax_i r(x, y_i)/β_r`: the self-normalised importance weights of π*_{β_r} for completions sampled
    from π_sft. For completions from another proposal q, `p_r ∝ exp(log π_sft + r/β_r − log q)`.

    Args:
        rewards: `[B, K]` r(x, y_i).
        beta_r: β_r > 0, the temperature of the target; small β_r trusts the reward more.
        mask: `[B, K]` bool, true where a completion exists; all do by default.
        reference_logp: `[B, K]` log π_sft(y_i|x); given exactly when `proposal_logp` is.
        proposal_logp: `[B, K]` log q(y_i|x); π_sft by default.

    Returns:
        `[B, K]` log p_r, −inf where there is no completion.

    Raises:
        ValueError: wrong shape or type, β_r not above 0, or only one of `reference_logp` and `proposal_logp`.
    """
    check_positive("beta_r", beta_r)
    if reference_logp is None or proposal_logp is None:
        if reference_logp is not proposal_logp:
            raise ValueError("a proposal correction needs both reference_logp and proposal_logp")
        (reward,), live = as_groups({"rewards": rewards}, mask)
        return masked_log_softmax(_energy(reward, live, beta_r), live)
    values = {"rewards": rewards, "reference_logp": reference_logp, "proposal_logp": proposal_logp}
    (reward, reference, proposal), live = as_groups(values, mask)
    return masked_log_softmax(_energy(reward, live, beta_r) + (reference - proposal), live)


def log_preference_target(
    preferred: Tensor,
    *,
    num_completions: int,
    epsilon: float,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log of the target distribution that a preference defines (Eq. 18, for any K).

    `1 − ε` on the preferred completion, `ε` shared equally by the others. The paper has K = 2 and ε = 1e-3. A
    preferred completion without a rival has probability 1: there is nothing to share ε with.

    Args:
        preferred: `[B]` int64, the column of the preferred completion. It means nothing in a row that has no
            completion at all.
        num_completions: K.
        epsilon: 0 ≤ ε < 1. The reverse KL needs the smoothing: at ε = 0 it is infinite. DPO as published (Eq. 7) is the
            forward KL at ε = 0.
        mask: `[B, K]` bool, true where a completion exists; all do by default.
        dtype: floating type of the result.

    Returns:
        `[B, K]` log p_h, −inf where there is no completion.

    Raises:
        ValueError: wrong shape or type, ε outside [0, 1), or a preferred completion that does not exist.
    """
    if epsilon != 0:
        check_fraction("epsilon", epsilon)
    if num_completions < 1:
        raise ValueError(f"num_completions must be at least 1, not {num_completions}")
    shape = torch.Size([*preferred.shape, num_completions])
    live = torch.ones(shape, dtype=torch.bool, device=preferred.device) if mask is None else mask
    check_mask(live, shape)
    won = preferred_column(preferred, live)
    losers = live.sum(dim=-1, keepdim=True) - 1
    log_share = (math.log(epsilon) if epsilon else -math.inf) - losers.clamp(min=1).to(dtype).log()
    log_win = math.log1p(-epsilon) * losers.clamp(0, 1).to(dtype)
    return torch.where(won, log_win, log_share).masked_fill(~live, -math.inf)


def preferred_column(preferred: Tensor, mask: Tensor) -> Tensor:
    """`[B, K]` bool: true at each row's preferred completion; nowhere in a row that has no completion.

    Raises:
        ValueError: not int64 `[B]`, an index outside 0 … K−1, or one whose completion is masked in a row that has
            others.
    """
    if preferred.dtype != torch.int64 or preferred.shape != mask.shape[:1]:
        raise ValueError(f"preferred must be int64 [B], one per row, not {preferred.dtype} {list(preferred.shape)}")
    num_completions = mask.shape[1]
    outside = (preferred < 0) | (preferred >= num_completions)
    won = torch.arange(num_completions, device=preferred.device) == preferred[:, None]
    wrong = outside | (mask.any(dim=-1) & ~(won & mask).any(dim=-1))
    if wrong.any():  # asked once: each question makes the host wait for a device
        row = int((outside if outside.any() else wrong).nonzero()[0, 0])
        what = f"outside 0 … {num_completions - 1}" if outside[row] else "a masked completion"
        raise ValueError(f"preferred[{row}] is {int(preferred[row])}, {what}")
    return won & mask


def _energy(rewards: Tensor, mask: Tensor, beta: float) -> Tensor:
    """`r/β` up to a constant per prompt; rewards far from 0 keep their differences, a tiny β does not overflow."""
    highest = rewards.detach().masked_fill(~mask, -math.inf).amax(dim=-1, keepdim=True)
    return torch.where(mask, rewards - highest, 0) / beta
