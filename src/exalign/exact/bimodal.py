"""What each divergence makes of a target with two modes when the policy can hold only one (Figures 1 and 5).

Completions are the points of a line. The supervised policy π_sft is a broad Gaussian on it, the reward has two bumps,
so the optimum π*_β has two modes. The policy to be aligned is again one Gaussian, whatever its mean and width:
less than the optimum needs, as an autoregressive model is less than an energy-based one. Each divergence is then
minimised by gradient descent with the functions that train language models, on the whole line instead of a sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exalign.objectives import (
    alpha_divergence,
    forward_kl,
    jeffreys,
    jensen_shannon,
    log_policy_distribution,
    log_reward_target,
    reverse_kl,
)

Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """The points `[N]`, log π_sft and rewards on them, and the β of the optimum."""

    points: Tensor
    reference_logp: Tensor
    rewards: Tensor
    beta: float

    @property
    def log_target(self) -> Tensor:
        """`[N]` log π*_β. Listing every point once is sampling from the uniform proposal, whose constant cancels."""
        row = self.reference_logp[None]
        return log_reward_target(
            self.rewards[None], beta_r=self.beta, reference_logp=row, proposal_logp=torch.zeros_like(row)
        )[0]


@dataclass(frozen=True, slots=True, eq=False)
class GaussianFit:
    """The Gaussian that minimises a divergence: log π_θ `[N]`, and the losses `[steps + 1]` on the way, in nats."""

    log_policy: Tensor
    losses: Tensor


def two_mode_line(*, num_points: int = 241, beta: float = 0.2) -> Line:
    """The line from −6 to 6: π_sft a Gaussian of width 1.5 around 0, reward bumps at −1.6 (1.0) and 1.6 (0.9)."""
    points = torch.linspace(-6, 6, num_points, dtype=torch.float64)
    reference_logp = gaussian_logp(points, torch.tensor([[0.0, math.log(1.5)]], dtype=torch.float64))[0]
    rewards = _bump(points, -1.6, 0.45) + 0.9 * _bump(points, 1.6, 0.45)
    return Line(points, reference_logp, rewards, beta)


def gaussian_logp(points: Tensor, parameters: Tensor) -> Tensor:
    """Log-probabilities of Gaussians on the points; parameters are (mean, log of width). `[N]`, `[S, 2]` → `[S, N]`."""
    mean, log_std = parameters[:, :1], parameters[:, 1:]
    return (-0.5 * ((points - mean) / log_std.exp()).square()).log_softmax(dim=-1)


def fit_gaussian(line: Line, divergence: Divergence, *, steps: int = 300, learning_rate: float = 0.1) -> GaussianFit:
    """Minimise a divergence to the optimum over all Gaussians: Adam from several means at once, the best end kept.

    Several starts because the reverse KL has a local minimum at each mode; the result is the least of them.
    """
    starts = torch.linspace(-2, 2, 5, dtype=torch.float64)
    parameters = torch.stack([starts, torch.zeros_like(starts)], dim=1).requires_grad_()
    reference = line.reference_logp.expand(len(starts), -1)
    log_t = line.log_target.expand(len(starts), -1)
    optimizer = torch.optim.Adam([parameters], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps + 1):
        policy = gaussian_logp(line.points, parameters)
        loss = divergence(_enumerated(policy, reference), log_t)
        losses.append(loss.detach())
        if step < steps:
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
    # Starts that end in the same place tie up to rounding: the first of them, so that it is the same everywhere.
    best = int((losses[-1] < losses[-1].min() + 1e-9).nonzero()[0, 0])
    return GaussianFit(policy[best].detach(), torch.stack(losses)[:, best])


def fit_table(line: Line, divergence: Divergence, *, steps: int = 200) -> Tensor:
    """Minimise a divergence to the optimum over all distributions on the points: `[N]` log π_θ.

    The policy of unlimited capacity, for comparison: one free number per point, started at π_sft (L-BFGS).
    """
    logits = line.reference_logp.clone().requires_grad_()
    reference = line.reference_logp[None]
    log_t = line.log_target[None]
    optimizer = torch.optim.LBFGS([logits], max_iter=steps, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        policy = logits.log_softmax(dim=-1)[None]
        loss = divergence(_enumerated(policy, reference), log_t).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().log_softmax(dim=-1)


def alignment_loss(line: Line) -> Divergence:
    """`−J/β = KL(π_θ‖π_sft) − E[r]/β` (Eq. 4) in the form of a divergence, which needs the rewards, not the target."""

    def loss(log_p_policy: Tensor, log_p_target: Tensor) -> Tensor:
        gain = line.rewards / line.beta - (log_p_policy - line.reference_logp)
        return -(log_p_policy.exp() * gain).sum(dim=-1)

    return loss


@dataclass(frozen=True, slots=True, eq=False)
class Densities:
    """Densities `[N]` over `points`: of the target π*_β, of each policy by its name, of π_sft where it is shown."""

    points: Tensor
    target: Tensor
    policies: Mapping[str, Tensor]
    reference: Tensor | None = None


def two_mode_figure() -> Densities:
    """Figure 1: the Gaussian fitted by each divergence."""
    line = two_mode_line()
    divergences: dict[str, Divergence] = {
        "reverse KL (EXO)": reverse_kl,
        "forward KL (DPO)": forward_kl,
        "Jensen–Shannon": jensen_shannon,
        "Jeffreys": jeffreys,
        "alpha 0.9": functools.partial(alpha_divergence, alpha=0.9),
    }
    fitted = {name: fit_gaussian(line, divergence).log_policy for name, divergence in divergences.items()}
    return replace(_densities(line, fitted), reference=_density(line.points, line.reference_logp))


def objective_figure() -> tuple[Densities, Densities]:
    """Figure 5: what maximising the alignment objective, and minimising EXO and DPO, gives.

    The first policies may be any distribution, and all become the target; the second are Gaussians, which hold one
    mode, and there EXO agrees with the alignment objective while DPO does not.
    """
    line = two_mode_line()
    objectives = {"alignment objective": alignment_loss(line), "EXO": reverse_kl, "DPO": forward_kl}
    unlimited = {name: fit_table(line, loss) for name, loss in objectives.items()}
    gaussian = {name: fit_gaussian(line, loss).log_policy for name, loss in objectives.items()}
    return _densities(line, unlimited), _densities(line, gaussian)


def _densities(line: Line, policies: Mapping[str, Tensor]) -> Densities:
    found = {name: _density(line.points, logp) for name, logp in policies.items()}
    return Densities(line.points, _density(line.points, line.log_target), found)


def _density(points: Tensor, logp: Tensor) -> Tensor:
    return logp.exp() / (points[1] - points[0])


def _enumerated(policy_logp: Tensor, reference_logp: Tensor) -> Tensor:
    """The policy's distribution over the whole line: its own, as the points are all there is."""
    return log_policy_distribution(
        policy_logp, reference_logp, beta_pi=1.0, proposal_logp=torch.zeros_like(reference_logp)
    )


def _bump(points: Tensor, centre: float, width: float) -> Tensor:
    return (-0.5 * ((points - centre) / width).square()).exp()
