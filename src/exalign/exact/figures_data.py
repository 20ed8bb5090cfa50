"""The numbers behind figures of the paper, and one more, from the shipped losses; drawing is someone else's.

| function | figure |
|---|---|
| `two_mode_figure` | Figure 1: what each divergence makes of a two-mode optimum with a one-mode policy |
| `objective_figure` | Figure 5: which objectives share an optimum (any policy) and which a solution (a limited one) |
| `gradient_error_figure` | Theorems 3.2 and 3.3: error of the gradient against the number of completions K |
| `on_policy_figure` | the same a nat from π_sft: EXO from old and own samples beside RLOO and PPO |

All are float64 tensors on the CPU, the same on every run, and take seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exalign.exact.alignment import AlignmentProblem, kl
from exalign.exact.bimodal import Divergence, Line, alignment_loss, fit_gaussian, fit_table, two_mode_line
from exalign.exact.convergence import (
    Gradient,
    GradientErrors,
    divergence_gradient,
    estimator_errors,
    gradient_errors,
    policy_logits,
    ppo_gradient,
    rloo_gradient,
)
from exalign.exact.world import World
from exalign.objectives import alpha_divergence, forward_kl, jeffreys, jensen_shannon, reverse_kl


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


def gradient_error_figure(*, replicates: int = 5_000) -> dict[str, GradientErrors]:
    """Measure bias and rms error of EXO's and DPO's gradients for K = 2 … 1024, from π_sft and from the policy.

    In theory slopes are −1 (bias) and −½ (rms).
    """
    problem, logits = example_problem(seed=3)
    generator = torch.Generator().manual_seed(0)
    policy = problem.world.log_probs(logits)
    sizes, curves = [2**power for power in range(1, 11)], {}
    for name, divergence, exact, proposal in (
        ("EXO", reverse_kl, problem.reverse_kl_gradient(logits), None),
        ("DPO", forward_kl, problem.forward_kl_gradient(logits), None),
        ("EXO, sampled from the policy", reverse_kl, problem.reverse_kl_gradient(logits), policy),
    ):
        where = (problem, logits, divergence, exact, sizes)
        curves[name] = gradient_errors(*where, replicates=replicates, generator=generator, proposal_logp=proposal)
    return curves


def on_policy_figure(*, replicates: int = 5_000) -> dict[str, GradientErrors]:
    """Error of the gradient at β_π = 1, K = 2 … 256, a nat from π_sft, by method and by where completions come from.

    EXO from π_sft, from an earlier policy on the way (a stale q, half the way in logits) and from the policy itself,
    beside RLOO and PPO with a perfect critic. On its own samples EXO is (K − 1)/K of RLOO: its bias is the K-th part of
    the gradient. RLOO and PPO have none.
    """
    problem, logits = example_problem(seed=3)
    problem = replace(problem, beta_pi=1.0, beta_r=0.1)
    logits = _at_kl(problem, logits, 1.0)
    policy = problem.world.log_probs(logits)
    halfway = problem.world.log_probs((logits + policy_logits(problem, problem.reference_logp)) / 2)
    estimators: dict[str, tuple[Gradient, Tensor]] = {
        name: (divergence_gradient(problem, logits, reverse_kl, proposal), proposal)
        for name, proposal in (
            ("EXO, from π_sft", problem.reference_logp),
            ("EXO, stale q", halfway),
            ("EXO, on-policy", policy),
        )
    }
    estimators["RLOO"] = rloo_gradient(problem, logits), policy
    estimators["PPO, perfect critic"] = ppo_gradient(problem, logits, lam=0.95), policy
    exact, generator = problem.reverse_kl_gradient(logits), torch.Generator().manual_seed(0)
    sizes = [2**power for power in range(1, 9)]
    return {
        name: estimator_errors(gradient, exact, proposal, sizes, replicates=replicates, generator=generator)
        for name, (gradient, proposal) in estimators.items()
    }


def _at_kl(problem: AlignmentProblem, logits: Tensor, nats: float) -> Tensor:
    """Logits `nats` from π_sft, on the line towards the optimum with the direction of `logits` added."""
    start = policy_logits(problem, problem.reference_logp)
    direction = policy_logits(problem, problem.optimum) - start + (logits - start)
    low, high = 0.0, 1.0
    while kl(problem.world.log_probs(start + high * direction), problem.reference_logp) < nats:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        further = kl(problem.world.log_probs(start + middle * direction), problem.reference_logp) > nats
        low, high = (low, middle) if further else (middle, high)
    return start + low * direction


def example_problem(*, seed: int, num_tokens: int = 3, num_steps: int = 3) -> tuple[AlignmentProblem, Tensor]:
    """A random problem (β_π = β_r = ½) and the logits of a policy that has left π_sft but not arrived."""
    world = World.enumerate(num_tokens=num_tokens, num_steps=num_steps)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reference = 0.5 * draw(len(world.prefixes), num_tokens)
    rewards = 0.5 * draw(len(world.completions))
    problem = AlignmentProblem(world, world.log_probs(reference), rewards, beta_pi=0.5, beta_r=0.5)
    return problem, reference + 0.5 * draw(len(world.prefixes), num_tokens)


def _densities(line: Line, policies: Mapping[str, Tensor]) -> Densities:
    found = {name: _density(line.points, logp) for name, logp in policies.items()}
    return Densities(line.points, _density(line.points, line.log_target), found)


def _density(points: Tensor, logp: Tensor) -> Tensor:
    return logp.exp() / (points[1] - points[0])
