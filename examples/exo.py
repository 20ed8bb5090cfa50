"""EXO from beginning to end in one file: a policy, prompts, K samples, a reward, the loss, a step, the evaluation.

`python examples/exo.py` takes a minute on a CPU and needs no network: a tiny language model learns to write remarks
about films, and is then aligned with a reward. It uses the functions that the library itself uses, without what the
library adds: recipes, resuming, several processes, frontiers and reports.

Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment", arXiv 2402.00856v2. A group is one prompt
with its K completions; B groups make a batch. Log-probabilities are sums over a completion's tokens, in nats.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import logging

from exalign.data.batching import Group, completion_mask, group_of, stack_values
from exalign.data.record import Completion, Record
from exalign.data.synthetic import reward, write_world
from exalign.data.tokenization import TokenLimits, tokenize_records
from exalign.evaluation.statistics import BOOTSTRAP
from exalign.models.loading import load_policy, load_tokenizer
from exalign.models.logprobs import completion_logprobs, reference_logprobs
from exalign.models.model_settings import ModelSettings
from exalign.objectives import kl_estimate, log_policy_distribution, log_reward_target, reverse_kl
from exalign.rollout.sampler import GroupedSampler
from exalign.rollout.settings import SampleSettings
from exalign.training.batches import EpochBatches
from exalign.training.optimizer import adamw, learning_rate_factor, set_learning_rate

K = 8
TEMPERATURE = 1.0  # τ: a policy is softmax(logits / τ), in sampling and in log-probabilities
MODEL = {"model_type": "gpt2", "n_layer": 2, "n_embd": 96, "n_head": 4, "n_positions": 96}
LIMITS = {"max_prompt_tokens": 24, "max_new_tokens": 56, "num_completions": K, "batch_completions": 256}


def exo_loss(
    policy: nn.Module, groups: Sequence[Group], *, beta_pi: float, beta_r: float, temperature: float
) -> Tensor:
    """KL(p_f ‖ p_r), mean over prompts: the policy's distribution over K completions against the rewards' (Eq. 15)."""
    mask = completion_mask(groups)  # [B, K]: prompts may have different numbers of completions
    policy_logp = completion_logprobs(policy, groups, temperature=temperature)  # [B, K] log π_θ(y|x), with gradient
    reference_logp = stack_values(groups, "reference_logp")  # [B, K] log π_sft(y|x), numbers
    log_p_f = log_policy_distribution(policy_logp, reference_logp, beta_pi=beta_pi, mask=mask)  # Eq. 12, 13
    log_p_r = log_reward_target(stack_values(groups, "rewards"), beta_r=beta_r, mask=mask)  # Eq. 14
    return reverse_kl(log_p_f, log_p_r, mask).mean()


def sft_loss(policy: nn.Module, groups: Sequence[Group]) -> Tensor:
    """Mean of −log π(y|x) per token."""
    logp = completion_logprobs(policy, groups, temperature=1.0)
    return -logp.sum() / sum(len(ids) for group in groups for ids in group.completion_ids)


def steps(
    loss: Callable[[nn.Module, Sequence[Group]], Tensor],
    policy: nn.Module,
    groups: Sequence[Group],
    *,
    learning_rate: float,
    epochs: int,
    batch_prompts: int,
) -> Iterator[float]:
    """Train `policy` by AdamW, its rate rising for a tenth of the steps, then falling as a cosine; the losses."""
    batches = EpochBatches(groups, batch_prompts=batch_prompts, epochs=epochs, seed=0)
    optimizer = adamw(policy, betas=(0.9, 0.95), weight_decay=0.0, device=torch.device("cpu"))
    total, warmup = len(batches), int(0.1 * len(batches))
    for step in range(total):
        factor = learning_rate_factor(step, num_steps=total, warmup_steps=warmup, schedule="cosine")
        set_learning_rate(optimizer, learning_rate * factor)
        (value := loss(policy, batches[step])).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield value.item()


def with_reference(reference: nn.Module, groups: Sequence[Group], *, temperature: float) -> list[Group]:
    """The groups with log π_sft(y|x): numbers, after which training needs no reference model."""
    found = reference_logprobs(reference, groups, temperature=temperature, token_budget=4096)
    return [replace(group, reference_logp=logp) for group, logp in zip(groups, found, strict=True)]


def rollout(policy: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Record], *, seed: int) -> list[Group]:
    """K completions of each prompt, drawn from the policy, with their rewards."""
    sampler = GroupedSampler(policy, tokenizer, SampleSettings(**LIMITS), temperature=TEMPERATURE, seed=seed)
    records = list(sampler.sample(prompts))
    rewards = reward([r.prompt for r in records], [[c.text for c in r.completions] for r in records])
    scored = [record.with_rewards(values) for record, values in zip(records, rewards, strict=True)]
    return [group_of(record, index) for index, record in enumerate(scored)]


def evaluate(policy: nn.Module, reference: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Record]) -> str:
    """Reward and KL to π_sft of new samples, with their 95 % intervals over prompts."""
    groups = with_reference(reference, rollout(policy, tokenizer, prompts, seed=1), temperature=TEMPERATURE)
    own = stack_values(with_reference(policy, groups, temperature=TEMPERATURE), "reference_logp")
    kl = BOOTSTRAP.mean(kl_estimate(own, stack_values(groups, "reference_logp")).numpy())
    gained = BOOTSTRAP.mean(stack_values(groups, "rewards").mean(dim=1).numpy())
    return (
        f"reward {gained.estimate:.2f} [{gained.low:.2f}, {gained.high:.2f}] "
        f"at KL {kl.estimate:.2f} [{kl.low:.2f}, {kl.high:.2f}] nats"
    )


def read(path: Path) -> list[Record]:
    """Rows with `prompt` and, for the supervised policy, `completion`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [(Completion(row["completion"]),) if "completion" in row else () for row in rows]
    return [Record(str(i), row["prompt"], own) for i, (row, own) in enumerate(zip(rows, texts, strict=True))]


def main(*, num_sft: int = 2500, num_prompts: int = 384, num_test: int = 128) -> None:
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), num_sft=num_sft, num_prompts=num_prompts, num_test=num_test)
        tokenizer = load_tokenizer(f"{folder}/tokenizer")
        texts, prompts, test = (read(Path(folder) / f"{name}.jsonl") for name in ("sft", "prompts", "test"))
    test = [replace(record, completions=()) for record in test]

    torch.manual_seed(0)
    policy = load_policy(ModelSettings(config=MODEL), tokenizer)
    limits = TokenLimits(max_prompt_tokens=24, max_completion_tokens=56)
    examples = list(tokenize_records(texts, tokenizer, limits=limits, counts=Counter()))
    for number, loss in enumerate(steps(sft_loss, policy, examples, learning_rate=3e-3, epochs=2, batch_prompts=64)):
        if number % 20 == 0:
            print(f"SFT step {number:3}: {loss:.3f} nats per token")

    reference = copy.deepcopy(policy)
    groups = with_reference(reference, rollout(policy, tokenizer, prompts, seed=0), temperature=TEMPERATURE)
    exo = partial(exo_loss, beta_pi=1.0, beta_r=0.5, temperature=TEMPERATURE)
    for number, loss in enumerate(steps(exo, policy, groups, learning_rate=1e-3, epochs=4, batch_prompts=32)):
        if number % 8 == 0:
            print(f"EXO step {number:3}: KL(p_f‖p_r) {loss:.3f} nats")

    print("supervised:", evaluate(reference, reference, tokenizer, test))
    print("aligned:   ", evaluate(policy, reference, tokenizer, test))


if __name__ == "__main__":
    main()
