"""A policy and its critic as one module, for tasks that train both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.models.logprobs import packed_token_logprobs
from exalign.models.packing import plan_for
from exalign.models.scalar_head import completion_values


class ActorCritic(nn.Module):
    """The policy is `model`, a transformers language model; `critic` is a sequence classifier with one label.

    They share no weights. Their forward takes groups, so that whatever hooks into it (mixed precision) acts on both.
    `kl_coefficient` is a number that their trainer may adapt on the way, and is kept with the weights in checkpoints.
    As under `PackedPolicy`, gradients of the policy's vocabulary go to `.grad` directly: use `backward()`.
    """

    def __init__(self, model: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.critic = critic
        self.kl_coefficient: Tensor
        self.register_buffer("kl_coefficient", torch.zeros(()))
        plan_for(model)
        plan_for(critic)

    def forward(
        self, groups: Sequence[Group], *, temperature: float, critic_alone: bool = False
    ) -> tuple[Tensor, Tensor]:
        """log π(y_t|x, y_<t) in nats and the value V_t of the state before y_t: two `[B, K, T]`, 0 on padding.

        While the critic is trained alone the log-probabilities carry no gradient: whatever exchanges gradients between
        processes then waits for the critic's only.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not critic_alone):
            logp = packed_token_logprobs(self.model, groups, temperature)
        return logp, completion_values(self.critic, groups)
