"""Divergences between the policy's distribution and the target, over the K completions of each prompt.

| function | of p = policy, t = target | as a training loss |
|---|---|---|
| `reverse_kl` | `Σ p (log p − log t)` | EXO (Eq. 15, 18): seeks the target's main mode |
| `forward_kl` | `−Σ t log p` | DPO (Eq. 7, 19): covers all of the target |
| `jensen_shannon` | `½ KL(p‖m) + ½ KL(t‖m)`, `m = ½(p + t)` | between the two, never above log 2 |
| `jeffreys` | `KL(p‖t) + KL(t‖p)` | both at once |
| `alpha_divergence` | `(1 − Σ p^α t^{1−α}) / (α(1−α))` | from KL(t‖p) at α → 0 to KL(p‖t) at α → 1 |

All take `log_p_policy` and `log_p_target`, `[B, K]` normalised log-probabilities as `exalign.objectives.matching`
makes them, and give nats per prompt, `[B]`. Each is smallest exactly where p = t; all but `forward_kl`, which is a
cross-entropy, are 0 there. A completion that is masked, or impossible under both (−inf), contributes nothing; a prompt
with one completion, or none, has divergence 0 (and cross-entropy 0) and no gradient. Inputs that are not floating
`[B, K]` of one shape, or a mask that is not boolean `[B, K]`, are a `ValueError`.

A divergence that is infinite is returned as infinite: the reverse KL (and Jeffreys) where the target excludes a
completion, log t = −inf, that the policy does not. The targets of `matching` never do so for finite rewards and ε in
(0, 1); there, value and gradient are finite however far apart p and t are.

>>> import torch
>>> p = torch.tensor([[0.5, 0.5, 0.0]]).log()
>>> t = torch.tensor([[0.9, 0.1, 0.0]]).log()
>>> print(f"{reverse_kl(p, t).item():.4f} {forward_kl(p, t).item():.4f} {jeffreys(p, t).item():.4f}")
0.5108 0.6931 0.8789
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exalign.objectives.masked import as_groups, check_fraction, weighted_sum


def reverse_kl(log_p_policy: Tensor, log_p_target: Tensor, mask: Tensor | None = None) -> Tensor:
    """EXO: `KL(p‖t) = Σ_i p_i (log p_i − log t_i)` (Eq. 15; Eq. 18 with a preference target). `[B, K]` → `[B]`, nats.

    With `p = log_policy_distribution(...)` its gradient is
    `∂L/∂log π_θ(y_i) = β_π p_i (log p_i − log t_i − L)`, which sums to 0 over a prompt's completions. Where the policy
    is certain of a wrong completion (p_i → 0 for the right ones) it vanishes; `saturated` finds such prompts.
    """
    log_p, log_t, live = _prepared(log_p_policy, log_p_target, mask)
    return weighted_sum(log_p, log_p - log_t, live)


def forward_kl(log_p_policy: Tensor, log_p_target: Tensor, mask: Tensor | None = None) -> Tensor:
    """DPO: the forward KL as cross-entropy, `−Σ_i t_i log p_i` (Eq. 19). `[B, K]` → `[B]`, nats.

    This is `KL(t‖p)` plus the target's entropy, which does not depend on the policy. With a preference target,
    K = 2 and ε → 0 it is the loss of Eq. 7, `−log σ(f_w − f_l)`; with ε > 0 its label-smoothed form. A target that puts
    all its weight on one completion (log t = −inf elsewhere) is allowed. With `p = log_policy_distribution(...)` the
    gradient is `∂L/∂log π_θ(y_i) = β_π (p_i − t_i)`.
    """
    log_p, log_t, live = _prepared(log_p_policy, log_p_target, mask)
    return -weighted_sum(log_t, log_p, live)


def jensen_shannon(log_p_policy: Tensor, log_p_target: Tensor, mask: Tensor | None = None) -> Tensor:
    """`½ KL(p‖m) + ½ KL(t‖m)` with `m = (p + t)/2`. Symmetric, at most log 2. `[B, K]` → `[B]`, nats.

    Not in the paper.
    """
    log_p, log_t, live = _prepared(log_p_policy, log_p_target, mask)
    log_m = torch.logaddexp(log_p, log_t) - math.log(2)
    return 0.5 * (weighted_sum(log_p, log_p - log_m, live) + weighted_sum(log_t, log_t - log_m, live))


def jeffreys(log_p_policy: Tensor, log_p_target: Tensor, mask: Tensor | None = None) -> Tensor:
    """`KL(p‖t) + KL(t‖p)`: the sum of both directions, not their mean. `[B, K]` → `[B]`, nats.

    Not in the paper.
    """
    log_p, log_t, live = _prepared(log_p_policy, log_p_target, mask)
    return weighted_sum(log_p, log_p - log_t, live) + weighted_sum(log_t, log_t - log_p, live)


def alpha_divergence(log_p_policy: Tensor, log_p_target: Tensor, mask: Tensor | None = None, *, alpha: float) -> Tensor:
    """Amari's α-divergence `(1 − Σ_i p_i^α t_i^{1−α}) / (α(1−α))`, 0 < α < 1. `[B, K]` → `[B]`, nats.

    It runs from KL(t‖p) as α → 0 to KL(p‖t) as α → 1; at α = ½ it is four times the squared Hellinger distance
    `1 − Σ √(p t)`. Within (0, 1) it never exceeds 1/(α(1−α)), however far apart p and t are. Not in the paper.

    An α outside (0, 1) is a `ValueError`: the ends are `forward_kl` and `reverse_kl`.
    """
    check_fraction("alpha", alpha)
    log_p, log_t, live = _prepared(log_p_policy, log_p_target, mask)
    # As Σ p = Σ t = 1, subtracting the products from the weighted mean termwise is the same sum with no term below 0.
    terms = alpha * log_p.exp() + (1 - alpha) * log_t.exp() - (alpha * log_p + (1 - alpha) * log_t).exp()
    return torch.where(live, terms, 0).sum(dim=-1) / (alpha * (1 - alpha))


def _prepared(log_p_policy: Tensor, log_p_target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Checked log-probabilities and where they count: not where masked, nor where both are −inf."""
    (log_p, log_t), live = as_groups({"log_p_policy": log_p_policy, "log_p_target": log_p_target}, mask)
    live = live & ~(torch.isneginf(log_p) & torch.isneginf(log_t))
    return torch.where(live, log_p, 0), torch.where(live, log_t, 0), live
