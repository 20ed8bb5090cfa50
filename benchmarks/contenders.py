"""What is compared with what: ways to make one optimizer step of EXO on the same groups from the same weights.

`gradient(groups, micro)` adds the gradient of the mean loss per prompt to the parameters and returns the loss; `micro`
is the size of a micro-batch in the contender's own unit. `update()` clips and makes the AdamW step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks.workload import BETA_PI, BETA_R, EPSILON, make_model, make_tokenizer
from exalign.data.batching import Group
from exalign.device import device
from exalign.methods.matching import Matching, MatchingTask
from exalign.models.loading import load_policy
from exalign.models.logprobs import PackedPolicy
from exalign.models.model_settings import ModelSettings
from exalign.objectives import log_policy_distribution, log_preference_target, log_reward_target, reverse_kl
from exalign.training.batches import EpochBatches
from exalign.training.loop import accumulate
from exalign.training.optimizer import adamw, set_learning_rate

LEARNING_RATE = 1e-6
ADAM_BETAS = (0.9, 0.95)
GPT2_SIZES = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")


class Contender(Protocol):
    label: str
    unit: str  # what `micro` counts
    sizes: tuple[int, ...]  # micro-batch sizes to try
    precision: str
    model: Any

    def gradient(self, groups: Sequence[Group], micro: int) -> float: ...

    def update(self) -> None: ...


def gradient_of(model: Any) -> Tensor:
    """All gradients as one vector, in the order of the parameters."""
    return torch.cat([p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in model.parameters()])


def copy_of(model: Any) -> Any:
    """A plain transformers model with the weights of `model`."""
    copy = make_model(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def library_copy_of(model: Any) -> Any:
    """The same weights in a model that came through the library's own loading."""
    config = {name: value for name, value in model.config.to_dict().items() if name in GPT2_SIZES}
    settings = ModelSettings(config={"model_type": "gpt2", **config})
    copy = load_policy(settings, make_tokenizer(model.config.vocab_size - 1))
    copy.load_state_dict(model.state_dict())
    return copy


class Exalign:
    """The library's own step, as `training.loop` makes it."""

    label = "exalign"
    unit = "tokens"

    def __init__(self, model: Any, groups: Sequence[Group], *, precision: str = "fp32", copied: bool = True) -> None:
        self.sizes = (768, 1536, 3072)
        self.precision = precision
        self.label = "exalign" if precision == "fp32" else f"exalign, {precision}"
        self.model = library_copy_of(model) if copied else model
        settings = Matching(
            learning_rate=LEARNING_RATE,
            target="preference" if groups[0].num_completions == 2 else "reward",
            beta_pi=BETA_PI,
            beta_r=BETA_R,
            epsilon=EPSILON,
        )
        self.task = MatchingTask(EpochBatches(groups, batch_prompts=len(groups), epochs=1, seed=0), settings, 1.0)
        AcceleratorState._reset_state()  # contenders differ in precision
        self.accelerator = Accelerator(
            cpu=device().type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no"
        )
        policy = PackedPolicy(self.model).train()
        optimizer = adamw(policy, betas=ADAM_BETAS, weight_decay=0.0, device=device())
        set_learning_rate(optimizer, LEARNING_RATE)
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)

    def gradient(self, groups: Sequence[Group], micro: int) -> float:
        return accumulate(self.accelerator, self.policy, self.task, groups, micro)["loss"]

    def update(self) -> None:
        self.accelerator.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Official:
    """The way of the paper's published code: every row padded to the maximum length, full logits, a live reference.

    The maximum length is the longest row of the data, where the published scripts set 512 or more.
    """

    label = "official code's way"
    unit = "prompts"
    precision = "fp32"

    def __init__(self, model: Any, groups: Sequence[Group], reference: Any) -> None:
        self.model = copy_of(model).train()
        self.reference = reference
        rows = [len(group.prompt_ids) + len(ids) for group in groups for ids in group.completion_ids]
        self.length = max(rows)
        self.sizes = tuple(m for m in (1, 2, 4) if m == 1 or m * groups[0].num_completions <= 8)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=ADAM_BETAS, weight_decay=0.0, fused=True
        )

    def gradient(self, groups: Sequence[Group], micro: int) -> float:
        total = 0.0
        for begin in range(0, len(groups), micro):
            part = groups[begin : begin + micro]
            ids, attention, predicted = self._padded(part)
            logp = self._logps(self.model, ids, attention, predicted)
            with torch.no_grad():
                reference = self._logps(self.reference, ids, attention, predicted)
            k = part[0].num_completions
            loss = exo_loss(logp.view(-1, k), reference.view(-1, k), part).sum() / len(groups)
            loss.backward()
            total += float(loss.detach())
        return total

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _padded(self, part: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor]:
        rows = [(group.prompt_ids, ids) for group in part for ids in group.completion_ids]
        tokens = torch.zeros(len(rows), self.length, dtype=torch.long)
        attention, predicted = torch.zeros_like(tokens), torch.zeros(len(rows), self.length - 1)
        for row, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            tokens[row, :end] = torch.cat([prompt, completion])
            attention[row, :end] = 1
            predicted[row, len(prompt) - 1 : end - 1] = 1
        return tokens, attention, predicted

    @staticmethod
    def _logps(model: Any, ids: Tensor, attention: Tensor, predicted: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (logp * predicted).sum(1)


def exo_loss(logp: Tensor, reference_logp: Tensor, groups: Sequence[Group]) -> Tensor:
    """EXO per prompt `[B]`: preference target for pairs, reward target else, as all contenders minimise it."""
    log_p_policy = log_policy_distribution(logp, reference_logp, beta_pi=BETA_PI)
    if logp.shape[1] == 2:
        preferred = torch.tensor([group.preferred for group in groups], device=logp.device)
        target = log_preference_target(preferred, num_completions=2, epsilon=EPSILON)
    else:
        rewards = torch.stack([group.rewards for group in groups if group.rewards is not None])
        target = log_reward_target(rewards.to(logp.device), beta_r=BETA_R)
    return reverse_kl(log_p_policy, target)
