"""Losses that contrast completions without a distribution over them: of reward models, and what EXO is compared with.

| function | pair loss, w preferred to l | source |
|---|---|---|
| `bradley_terry_loss` | `−log σ(r_w − r_l)`, r a reward model's score | Eq. 3 |
| `simpo_loss` | `−log σ(β (ℓ̄_w − ℓ̄_l) − γ)` | Meng et al. 2024, arXiv 2405.14734, Eq. 6 |
| `ipo_loss` | `(h_w − h_l − 1/(2β))²` | Azar et al. 2023, arXiv 2310.12036, Eq. 17 |
| `orpo_loss` | `−ℓ̄_w − λ log σ(logit_w − logit_l)` | Hong et al. 2024, arXiv 2403.07691, Eq. 6, 7 |
| `cpo_loss` | `−ℓ_w − log σ(β (ℓ_w − ℓ_l))` | Xu et al. 2024, arXiv 2401.08417, §3 |
| `kto_loss` | of one completion with a label | Ethayarajh et al. 2024, arXiv 2402.01306, §4 |

ℓ = log π_θ(y|x), ℓ̄ = ℓ/T per token, h = log π_θ/π_sft, logit = log(p/(1 − p)) of p = exp ℓ̄. All published for K = 2;
for more completions the preferred one is compared with each other one, and the mean over these is taken. A prompt
whose preferred completion has no rival has no pair: its pair loss and gradient are 0.

`preferred` is int64 `[B]`, the column of the completion that won; `mask` is bool `[B, K]`, true where a completion
exists. A wrong shape or type, a preferred completion that does not exist, or a parameter out of its range is a
`ValueError`.

DPO needs none of these: it is `forward_kl`. With length normalisation (Lambert et al. 2024, arXiv 2411.15124, §5) it is
the same on nats per token:

>>> import torch
>>> from exalign.objectives import forward_kl, log_policy_distribution, log_preference_target
>>> lengths = torch.tensor([[4, 8]])
>>> policy_logp, reference_logp = torch.tensor([[-8.0, -24.0]]), torch.tensor([[-9.0, -20.0]])
>>> p = log_policy_distribution(per_token(policy_logp, lengths), per_token(reference_logp, lengths), beta_pi=4.0)
>>> t = log_preference_target(torch.tensor([0]), num_completions=2, epsilon=1e-6)
>>> print(f"{forward_kl(p, t).item():.4f}")  # log(1 + exp(−4 (1/4 + 4/8)))
0.0486
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from exalign.objectives.masked import as_groups, check_not_negative, check_positive, masked_mean
from exalign.objectives.matching import preferred_column


def per_token(logp: Tensor, lengths: Tensor, mask: Tensor | None = None) -> Tensor:
    """`log π(y_i|x) / T_i`: nats per token. `[B, K]` and lengths int `[B, K]`, each ≥ 1 → `[B, K]`, 0 where masked."""
    counted = lengths.to(torch.promote_types(logp.dtype, torch.float32))
    (value, length), live = as_groups({"logp": logp, "lengths": counted}, mask)
    if bool((length < 1)[live].any()):
        raise ValueError("every completion needs at least one token")
    return value / torch.where(live, length, 1)


def bradley_terry_loss(rewards: Tensor, preferred: Tensor, mask: Tensor | None = None) -> Tensor:
    """The reward model's: `−log σ(r(x, y_w) − r(x, y_l))` (Eq. 3). `[B, K]`, int64 `[B]` → `[B]` nats.

    >>> bradley_terry_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.6931])
    """
    margins, rivals = _margins(rewards, preferred, mask)
    return masked_mean(softplus(-margins), rivals)


def preference_accuracy(rewards: Tensor, preferred: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per prompt, over the losers: the share that scores below the preferred one (ties count half), and the margin.

    Shapes: `rewards` `[B, K]`, `preferred` `[B]`, `mask` `[B, K]` → two `[B]`; the margin is mean(r_w − r_l).

    >>> preference_accuracy(torch.tensor([[3.0, 1.0, 3.0]]), torch.tensor([0]), torch.ones(1, 3).bool())
    (tensor([0.7500]), tensor([1.]))
    """
    difference = rewards.gather(1, preferred[:, None]) - rewards
    losers = mask.scatter(1, preferred[:, None], False)
    return masked_mean((difference.sign() + 1) / 2, losers), masked_mean(difference, losers)


def simpo_loss(
    policy_logp: Tensor,
    lengths: Tensor,
    preferred: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float,
    gamma: float,
) -> Tensor:
    """SimPO: `−log σ(β (ℓ̄_w − ℓ̄_l) − γ)`, without a reference. `[B, K]`, int64 `[B]` → `[B]` nats.

    `beta` > 0 scales nats per token (the paper has 2 to 10), `gamma` ≥ 0 is the margin that is asked for.
    """
    check_positive("beta", beta)
    check_not_negative("gamma", gamma)
    margins, rivals = _margins(per_token(policy_logp, lengths, mask), preferred, mask)
    return masked_mean(-logsigmoid(beta * margins - gamma), rivals)


def ipo_loss(
    policy_logp: Tensor, reference_logp: Tensor, preferred: Tensor, mask: Tensor | None = None, *, beta: float
) -> Tensor:
    """IPO: `(h_w − h_l − 1/(2β))²`, h the log-ratio to π_sft; β is the paper's τ. `[B, K]`, int64 `[B]` → `[B]`, nats².

    It is smallest where the margin is 1/(2β), and so does not push it to infinity where a preference is certain.
    """
    check_positive("beta", beta)
    named = {"policy_logp": policy_logp, "reference_logp": reference_logp}
    (policy, reference), live = as_groups(named, mask)
    margins, rivals = _margins(policy - reference, preferred, live)
    return masked_mean((margins - 1 / (2 * beta)).square(), rivals)


def orpo_loss(
    policy_logp: Tensor, lengths: Tensor, preferred: Tensor, mask: Tensor | None = None, *, weight: float
) -> Tensor:
    """ORPO: supervised loss on the preferred, `−ℓ̄_w`, and λ times that of the log odds. `[B, K]`, int64 `[B]` → `[B]`.

    `log odds = log p − log(1 − p)` with p = exp ℓ̄, the geometric mean of its tokens' probabilities. `weight` is λ > 0.
    A p of exactly 1 has infinite odds: it is held below 1 by the type's rounding.
    """
    check_positive("weight", weight)
    mean_logp = per_token(policy_logp, lengths, mask)
    below_one = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    margins, rivals = _margins(below_one - torch.log(-torch.expm1(below_one)), preferred, mask)
    return _supervised(mean_logp, preferred, mask) + weight * masked_mean(-logsigmoid(margins), rivals)


def cpo_loss(policy_logp: Tensor, preferred: Tensor, mask: Tensor | None = None, *, beta: float) -> Tensor:
    """CPO: DPO without a reference, and the supervised loss of the preferred. `[B, K]`, int64 `[B]` → `[B]` nats."""
    check_positive("beta", beta)
    margins, rivals = _margins(policy_logp, preferred, mask)
    return _supervised(policy_logp, preferred, mask) + masked_mean(-logsigmoid(beta * margins), rivals)


def kto_loss(
    policy_logp: Tensor,
    reference_logp: Tensor,
    desirable: Tensor,
    kl: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: `λ_y (1 − σ(±β (h − z)))`, + for a desirable completion, − for an undesirable one. `[B, K]` → `[B]`.

    A completion is judged by itself, so that K = 1 is the usual record; with more the mean over them is taken.

    Args:
        policy_logp: `[B, K]` log π_θ(y|x).
        reference_logp: `[B, K]` log π_sft(y|x).
        desirable: bool `[B, K]`.
        kl: z ≥ 0, a scalar without gradient: the batch's estimate of KL(π_θ‖π_sft), from completions of other prompts
            in the paper, `mean h` over these; below 0 it counts as 0.
        mask: `[B, K]` bool.
        beta: β > 0.
        desirable_weight: λ_D > 0; the paper balances it and λ_U by the numbers of each.
        undesirable_weight: λ_U > 0.
    """
    check_positive("beta", beta)
    check_positive("desirable_weight", desirable_weight)
    check_positive("undesirable_weight", undesirable_weight)
    (policy, reference), live = as_groups({"policy_logp": policy_logp, "reference_logp": reference_logp}, mask)
    if desirable.dtype != torch.bool or desirable.shape != policy.shape:
        raise ValueError(f"desirable must be bool {list(policy.shape)}, not {desirable.dtype} {list(desirable.shape)}")
    above = beta * (policy - reference - kl.detach().clamp(min=0))
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(policy)
    return masked_mean(weight * torch.sigmoid(torch.where(desirable, -above, above)), live)


def _margins(values: Tensor, preferred: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the preferred completion has more than each other one, `[B, K]`, and where there is another one."""
    (value,), live = as_groups({"values": values}, mask)
    won = preferred_column(preferred, live)
    winner = torch.where(won, value, 0).sum(dim=-1, keepdim=True)
    rivals = live & ~won
    return torch.where(rivals, winner - value, 0), rivals


def _supervised(logp: Tensor, preferred: Tensor, mask: Tensor | None) -> Tensor:
    """`−ℓ_w` `[B]`; 0 in a row without completions."""
    (value,), live = as_groups({"logp": logp}, mask)
    return -torch.where(preferred_column(preferred, live), value, 0).sum(dim=-1)
