"""A language small enough to list: every completion, its probability under any policy, and all its derivatives.

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
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

END = 0


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """All completions of at most `num_steps` tokens.

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
