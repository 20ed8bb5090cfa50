"""How fast the gradient from K samples approaches the exact one: Theorems 3.2 and 3.3 with their rates.

The theorems say that as K → ∞ the gradient of EXO becomes that of `KL(π_θ^{β_π} ‖ π*_{β_r})`, and DPO's that of the
KL the other way round. The rates follow from what the gradient of one prompt is: a smooth function g of averages over
the K samples (the sums in Eq. 12 and 14, divided by K). Such averages deviate from their expectations by
`δ = O(K^{−½})` with mean 0, and

    g(E + δ) = g(E) + g′ δ + ½ δᵀ g″ δ + …

* the **root mean square error** is that of the linear term, `√(v/K)`: slope −½ on log-log axes;
* the **bias**, which averaging over more prompts does not remove, is that of the quadratic term, `c/K + O(K^{−2})`:
  slope −1.

`gradient_errors` measures both over many replicates R. For the bias, the linear term, whose mean is known to be 0, is
subtracted from every replicate: what is left is as small as the bias itself, so a few thousand replicates resolve it at
every K. A mean of noisy vectors is longer than its expectation; the excess, `tr Σ/R`, is subtracted, and the standard
error of the rest is reported.

Beside the divergences stand the on-policy gradients of RLOO and PPO, written as estimates of the same gradient,
`∂KL(π_θ ‖ π*_β)/∂ logits` at β_π = 1 and β = β_r, which is −1/β times the objective's (Eq. 17).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from exalign.exact.alignment import AlignmentProblem, example_problem, kl
from exalign.objectives import forward_kl, log_policy_distribution, log_reward_target, reverse_kl

Divergence = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Gradient(Protocol):
    """A K-sample estimate: how often each of N completions was drawn, over K, `[R, N]`, to gradients `[R, D]`."""

    def __call__(self, frequencies: Tensor, size: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Slope:
    """A straight line's slope through points on log-log axes, with the standard error that theirs imply."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True, eq=False)
class GradientErrors:
    """Error of the gradient from K samples, in the Euclidean norm over the policy's logits; `[S]` over sizes K.

    Attributes:
        num_completions: `[S]` K.
        bias: `‖E[g_K] − g‖`, corrected for the noise of the measured mean; 0 where noise hides it.
        bias_error: its standard error.
        rms: `√E‖g_K − g‖²`.
        rms_error: its standard error.
    """

    num_completions: Tensor
    bias: Tensor
    bias_error: Tensor
    rms: Tensor
    rms_error: Tensor

    def bias_slope(self, *, at_least: int = 1) -> Slope:
        """d log bias / d log K over K ≥ `at_least`; −1 in theory."""
        return self._slope(self.bias, self.bias_error, at_least)

    def rms_slope(self, *, at_least: int = 1) -> Slope:
        """d log rms / d log K over K ≥ `at_least`; −½ in theory."""
        return self._slope(self.rms, self.rms_error, at_least)

    def _slope(self, values: Tensor, errors: Tensor, at_least: int) -> Slope:
        chosen = (self.num_completions >= at_least) & (values > 0)
        if chosen.sum() < 2:
            raise ValueError(f"a slope needs two measured points with K ≥ {at_least}")
        sizes, values, errors = self.num_completions[chosen], values[chosen], errors[chosen]
        return fit_slope(sizes.log(), values.log(), errors / values)


def fit_slope(x: Tensor, y: Tensor, y_error: Tensor) -> Slope:
    """Weighted least squares through points `[S]` with independent standard errors."""
    weight = y_error.square().reciprocal()
    centred = x - (weight * x).sum() / weight.sum()
    precision = (weight * centred.square()).sum()
    return Slope((weight * centred * y).sum().item() / precision.item(), 1 / math.sqrt(precision.item()))


def gradient_errors(
    problem: AlignmentProblem,
    logits: Tensor,
    divergence: Divergence,
    exact: Tensor,
    num_completions: Sequence[int],
    *,
    replicates: int,
    generator: torch.Generator,
    proposal_logp: Tensor | None = None,
) -> GradientErrors:
    """Measure bias and root mean square error of a divergence's K-sample gradient at the policy `logits` `[C, V]`.

    `exact` `[C, V]` is the gradient that it should tend to, such as `problem.reverse_kl_gradient(logits)`. Completions
    are drawn from `proposal_logp` `[N]`, log q, or π_sft, in `replicates` ≥ 2 independent draws for each size K.
    """
    proposal = problem.reference_logp if proposal_logp is None else proposal_logp
    gradient = divergence_gradient(problem, logits, divergence, proposal)
    return estimator_errors(gradient, exact, proposal, num_completions, replicates=replicates, generator=generator)


def estimator_errors(
    gradient: Gradient,
    exact: Tensor,
    proposal_logp: Tensor,
    num_completions: Sequence[int],
    *,
    replicates: int,
    generator: torch.Generator,
) -> GradientErrors:
    """Measure bias and root mean square error of any K-sample gradient; see `gradient_errors`."""
    probs = proposal_logp.exp()
    rows = []
    for size in num_completions:
        frequencies = draw_counts(proposal_logp, size, replicates=replicates, generator=generator) / size
        errors = gradient(frequencies, size) - exact.flatten()
        linear = _derivative(functools.partial(gradient, size=size), probs)
        rest = errors - (frequencies - probs) @ linear
        rows.append((*length_of_mean(rest), *root_mean_square(errors)))
    bias, bias_error, rms, rms_error = torch.tensor(rows, dtype=exact.dtype).unbind(dim=1)
    return GradientErrors(torch.tensor(num_completions, dtype=exact.dtype), bias, bias_error, rms, rms_error)


def divergence_gradient(
    problem: AlignmentProblem, logits: Tensor, divergence: Divergence, proposal_logp: Tensor
) -> Gradient:
    """EXO's or another divergence's, for completions drawn from q."""
    scores = problem.world.scores(logits).flatten(start_dim=1)
    return lambda frequencies, size: (
        gradient_from_counts(problem, logits, divergence, frequencies, proposal_logp) @ scores
    )


def rloo_gradient(problem: AlignmentProblem, logits: Tensor) -> Gradient:
    """RLOO's with the KL in the reward: `−1/(β K) Σ_i (R_i − mean of the other R) ∂log π_θ(y_i)`, y_i ~ π_θ."""
    scores = problem.world.scores(logits).flatten(start_dim=1)
    rewards = penalised(problem, logits)

    def gradient(frequencies: Tensor, size: int) -> Tensor:
        mean = (frequencies @ rewards)[:, None]
        return -(frequencies * (rewards - mean)) @ scores * size / (size - 1) / problem.beta_r

    return gradient


def ppo_gradient(problem: AlignmentProblem, logits: Tensor, *, lam: float) -> Gradient:
    """PPO's at ratio 1 with a perfect critic: `−1/(β K) Σ_i Σ_t A_t ∂log π_θ(y_t)`, A_t the generalised advantages.

    `r_t` is −β (log π_θ/π_sft)(y_t), and r more at the last token (see `objectives.token_rewards`); the critic's value
    of a prefix is the expectation of what is to come under π_θ itself, so that the estimate has no bias whatever λ is.
    """
    each = _advantage_scores(problem, logits, lam)

    def gradient(frequencies: Tensor, size: int) -> Tensor:
        return -(frequencies @ each) / problem.beta_r

    return gradient


def penalised(problem: AlignmentProblem, logits: Tensor) -> Tensor:
    """`R_n = r_n − β_r log(π_θ/π_sft)(y_n)` `[N]`."""
    return problem.rewards - problem.beta_r * (problem.world.log_probs(logits) - problem.reference_logp)


def policy_logits(problem: AlignmentProblem, logp: Tensor) -> Tensor:
    """The logits `[C, V]` of the policy with these log-probabilities `[N]`: the mass that goes on with each token."""
    return torch.einsum("ncv,n->cv", problem.world.choices, logp.exp()).log()


def _advantage_scores(problem: AlignmentProblem, logits: Tensor, lam: float) -> Tensor:
    """`Σ_t A_t ∂log π_θ(y_t)/∂ logits` of every completion, `[N, C·V]`.

    The reward to come after a token is known up to what the prefix before it has paid. With `Q` the expected R of a
    completion that goes through a prefix and token, and V that of the prefix, `δ_t = Q_t − V_t` whatever the part paid.
    """
    world, rewards = problem.world, penalised(problem, logits)
    chance = world.log_probs(logits).exp()
    mass = torch.einsum("ncv,n->cv", world.choices, chance)
    through = torch.einsum("ncv,n->cv", world.choices, chance * rewards)
    difference = through / mass - (through.sum(dim=1) / mass.sum(dim=1))[:, None]  # [C, V]: δ of a token after a prefix
    rows = []
    for completion, path in zip(world.completions, world.choices, strict=True):
        prefixes = [world.prefixes.index(completion[:step]) for step in range(len(completion))]
        advantages, running = torch.zeros(len(world.prefixes), dtype=chance.dtype), torch.zeros((), dtype=chance.dtype)
        for row, token in reversed(list(zip(prefixes, completion, strict=True))):
            running = difference[row, token] + lam * running
            advantages[row] = running
        visited = path.sum(dim=-1, keepdim=True)
        rows.append((advantages[:, None] * (path - visited * logits.softmax(dim=-1))).flatten())
    return torch.stack(rows)


def gradient_from_counts(
    problem: AlignmentProblem, logits: Tensor, divergence: Divergence, counts: Tensor, proposal_logp: Tensor
) -> Tensor:
    """`∂L/∂log π_θ(y_n)` of K completions drawn from q, given as how often each was drawn.

    Drawing completion n c_n times is the same as holding it once with weight c_n, that is with proposal q/c_n: the
    gradient is equal to that of the list of K completions, and its cost does not grow with K. Only the proportions of
    the counts matter. `[R, N]` → `[R, N]`.
    """
    drawn = counts > 0
    weighted = proposal_logp - torch.where(drawn, counts, 1).log()
    reference = problem.reference_logp.expand_as(weighted)
    policy = problem.world.log_probs(logits).detach().expand_as(weighted).clone().requires_grad_()
    log_p = log_policy_distribution(policy, reference, beta_pi=problem.beta_pi, mask=drawn, proposal_logp=weighted)
    log_t = log_reward_target(
        problem.rewards.expand_as(weighted),
        beta_r=problem.beta_r,
        mask=drawn,
        reference_logp=reference,
        proposal_logp=weighted,
    )
    (gradient,) = torch.autograd.grad(divergence(log_p, log_t, drawn).sum(), policy)
    return gradient


def draw_counts(log_probs: Tensor, size: int, *, replicates: int, generator: torch.Generator) -> Tensor:
    """How often each completion occurs among `size` independent draws. `[N]` → `[replicates, N]`, rows sum to `size`.

    A multinomial as a chain of binomials: of what is left, completion n takes its share of the probability left.
    """
    probs = log_probs.exp()
    shares = (probs / probs.flip(0).cumsum(0).flip(0)).clamp(max=1)
    left = torch.full((replicates,), float(size), dtype=log_probs.dtype)
    columns = []
    for share in shares[:-1]:
        taken = torch.binomial(left, share.expand(replicates).contiguous(), generator=generator)
        columns.append(taken)
        left = left - taken
    return torch.stack([*columns, left], dim=1)


def _derivative(function: Callable[[Tensor], Tensor], point: Tensor, *, step: float = 1e-6) -> Tensor:
    """Jacobian `[N, D]` at `point` `[N]` of a function from rows `[R, N]` to rows `[R, D]`, by central differences."""
    moves = step * torch.eye(len(point), dtype=point.dtype) * point  # in proportion: every entry stays above 0
    difference = function(point + moves) - function(point - moves)
    return difference / (2 * step * point[:, None])


def length_of_mean(errors: Tensor) -> tuple[float, float]:
    """Length of the mean of error vectors `[R, D]`, corrected for noise, and its standard error."""
    mean = errors.mean(dim=0)
    covariance = torch.cov(errors.T) / len(errors)  # of the mean
    square = (mean.square().sum() - covariance.trace()).clamp(min=0)
    # Var(‖m‖²) of a normal m around μ is 4 μᵀΣμ + 2 tr Σ², and mᵀΣm estimates μᵀΣμ + tr Σ². The error of a root is that
    # of its square over twice the root.
    scatter = covariance.square().sum()
    spread = (4 * mean @ covariance @ mean - 2 * scatter).clamp(min=2 * scatter).sqrt().item()
    length = square.sqrt().item()
    return length, spread / (2 * length) if length > 0 else math.sqrt(spread)


def root_mean_square(errors: Tensor) -> tuple[float, float]:
    """Root mean square length of error vectors `[R, D]` and its standard error."""
    squares = errors.square().sum(dim=1)
    rms = squares.mean().sqrt().item()
    return rms, squares.std().item() / math.sqrt(len(errors)) / (2 * rms)


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
