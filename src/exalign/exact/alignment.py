"""The alignment objective, its optimum and its gradients, summed over every completion instead of sampled.

All of it follows from one derivative. The policy enters through the product of experts
`π_θ^{β_π} ∝ π_θ^{β_π} π_sft^{1−β_π}` (Eq. 9), written p; the target is `t = π*_{β_r}` (Eq. 5). Since
`∂ log p_m/∂ log π_θ(y_n) = β_π (1[m = n] − p_n)`,

* `∂ KL(p‖t)/∂ log π_θ(y_n) = β_π p_n (log p_n − log t_n − KL(p‖t))`,
* `∂ KL(t‖p)/∂ log π_θ(y_n) = β_π (p_n − t_n)`,

and Eq. 11, `J = −β_r KL(p‖t) + β_r log Z`, gives the objective's gradient as −β_r times the first. `World.scores`
carries them to the policy's logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

END = 0


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """A language small enough to list: all completions of at most `num_steps` tokens, and how likely a policy has them.

    A policy here is what a language model is, without the network: one distribution over the next token for every
    prefix, `softmax(logits[prefix])`. Token 0 ends a completion; one that reaches the last step without it is cut there
    and carries no end token, as in sampling. With two tokens and two steps there are three completions:

    >>> world = World.enumerate(num_tokens=2, num_steps=2)
    >>> world.completions
    ((0,), (1, 0), (1, 1))
    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    >>> print([f"{p:.3f}" for p in world.log_probs(logits).exp()])
    ['0.500', '0.134', '0.366']

    Shapes: `N` completions, `C` prefixes that need a next token, `V` tokens; a policy is logits `[C, V]`.

    Attributes:
        completions: N tuples of tokens.
        prefixes: C tuples of tokens, the empty one first: what the rows of a policy's logits stand for.
        choices: `[N, C, V]` float64, 1 where completion n takes token v after prefix c. A completion is a path
            through the tree of prefixes, so its log-probability is linear in the table of token log-probabilities.
    """

    completions: tuple[tuple[int, ...], ...]
    prefixes: tuple[tuple[int, ...], ...]
    choices: Tensor

    @staticmethod
    def enumerate(*, num_tokens: int, num_steps: int) -> World:
        """List the world of `num_tokens` ≥ 2 tokens, the end token included, and `num_steps` ≥ 1 steps."""
        if num_tokens < 2 or num_steps < 1:
            raise ValueError(f"a world needs 2 tokens and 1 step, not {num_tokens} and {num_steps}")
        completions: list[tuple[int, ...]] = []
        prefixes: list[tuple[int, ...]] = []
        level: list[tuple[int, ...]] = [()]
        for _ in range(num_steps):
            prefixes += level
            grown = [(*prefix, token) for prefix in level for token in range(num_tokens)]
            completions += [path for path in grown if path[-1] == END]
            level = [path for path in grown if path[-1] != END]
        completions += level
        row = {prefix: position for position, prefix in enumerate(prefixes)}
        choices = torch.zeros(len(completions), len(prefixes), num_tokens, dtype=torch.float64)
        for n, completion in enumerate(completions):
            for step, token in enumerate(completion):
                choices[n, row[completion[:step]], token] = 1
        return World(tuple(completions), tuple(prefixes), choices)

    def log_probs(self, logits: Tensor) -> Tensor:
        """`log π(y_n)`, the sum of its tokens' log-probabilities: `[C, V]` → `[N]`."""
        choices = self.choices.to(logits.dtype)
        return torch.einsum("ncv,cv->n", choices, logits.log_softmax(dim=-1))

    def scores(self, logits: Tensor) -> Tensor:
        """`∂ log π(y_n)/∂ logits[c, v]` in closed form: choice minus probability at every prefix y_n passes.

        `[C, V]` → `[N, C, V]`. Contracted with `∂L/∂log π(y_n)` it turns the gradient of any objective on sequence
        log-probabilities into that on the policy's parameters.
        """
        choices = self.choices.to(logits.dtype)
        return choices - choices.sum(dim=-1, keepdim=True) * logits.softmax(dim=-1)


@dataclass(frozen=True, slots=True, eq=False)
class AlignmentProblem:
    """One prompt: what to align (π_sft), to what (a reward for every completion), and how strongly.

    Attributes:
        world: the completions.
        reference_logp: `[N]` log π_sft, normalised.
        rewards: `[N]` r.
        beta_pi: β_π > 0.
        beta_r: β_r > 0. The optimum is π*_β with β = β_π β_r.
    """

    world: World
    reference_logp: Tensor
    rewards: Tensor
    beta_pi: float
    beta_r: float

    @property
    def optimum(self) -> Tensor:
        """`[N]` log π*_β, β = β_π β_r: the policy that maximises the objective (Theorem 3.1)."""
        return optimal_policy(self.reference_logp, self.rewards, beta=self.beta_pi * self.beta_r)

    @property
    def target(self) -> Tensor:
        """`[N]` log π*_{β_r}: what the product of experts has to become."""
        return optimal_policy(self.reference_logp, self.rewards, beta=self.beta_r)

    def experts(self, policy_logp: Tensor) -> Tensor:
        """`[N]` log π_θ^{β_π}, the normalised product of π_θ^{β_π} and π_sft^{1−β_π} (Eq. 9)."""
        return (self.beta_pi * policy_logp + (1 - self.beta_pi) * self.reference_logp).log_softmax(dim=-1)

    def objective(self, policy_logp: Tensor) -> Tensor:
        """The generalised alignment objective `E_p[r] − β_r KL(p‖π_sft)`, p = π_θ^{β_π} (Eq. 8). A scalar."""
        log_p = self.experts(policy_logp)
        return (log_p.exp() * self.rewards).sum() - self.beta_r * kl(log_p, self.reference_logp)

    def reverse_kl(self, policy_logp: Tensor) -> Tensor:
        """`KL(π_θ^{β_π} ‖ π*_{β_r})`, nats: what EXO minimises. A scalar."""
        return kl(self.experts(policy_logp), self.target)

    def forward_kl(self, policy_logp: Tensor) -> Tensor:
        """`KL(π*_{β_r} ‖ π_θ^{β_π})`, nats: what DPO minimises. A scalar."""
        return kl(self.target, self.experts(policy_logp))

    def reverse_kl_gradient(self, logits: Tensor) -> Tensor:
        """`∂ KL(π_θ^{β_π} ‖ π*_{β_r})/∂ logits`: the limit of EXO's gradient (Theorem 3.2). `[C, V]` → `[C, V]`."""
        log_p, log_t = self.experts(self.world.log_probs(logits)), self.target
        weight = self.beta_pi * log_p.exp() * (log_p - log_t - kl(log_p, log_t))
        return torch.einsum("n,ncv->cv", weight, self.world.scores(logits))

    def forward_kl_gradient(self, logits: Tensor) -> Tensor:
        """`∂ KL(π*_{β_r} ‖ π_θ^{β_π})/∂ logits`: the limit of DPO's gradient (Theorem 3.3). `[C, V]` → `[C, V]`."""
        log_p, log_t = self.experts(self.world.log_probs(logits)), self.target
        weight = self.beta_pi * (log_p.exp() - log_t.exp())
        return torch.einsum("n,ncv->cv", weight, self.world.scores(logits))

    def objective_gradient(self, logits: Tensor) -> Tensor:
        """`∂J/∂ logits = −β_r ∂KL(π_θ^{β_π} ‖ π*_{β_r})/∂ logits` (Eq. 17). `[C, V]` → `[C, V]`."""
        return -self.beta_r * self.reverse_kl_gradient(logits)


def optimal_policy(reference_logp: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """`log π*_β = log π_sft + r/β − log Z_β` (Eq. 5) over all completions. `[N]` → `[N]`."""
    return (reference_logp + rewards / beta).log_softmax(dim=-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p‖q) = Σ_n p_n (log p_n − log q_n)`, nats. `[N]` → a scalar."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


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
