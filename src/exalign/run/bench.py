"""What training and sampling cost on this machine, for the user's own model and shape of data, against its limit."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group, group_of, microbatches
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.methods.matching import Matching, MatchingTask, with_reference_logp
from exalign.models.flops import forward_flops, matmul_peak, timed, training_flops
from exalign.models.loading import load_policy, load_tokenizer
from exalign.models.logprobs import PackedPolicy
from exalign.models.model_settings import ModelSettings
from exalign.rollout.rollout import open_sampler
from exalign.rollout.scorers import max_positions
from exalign.rollout.settings import SampleSettings
from exalign.settings import Settings
from exalign.training.batches import EpochBatches
from exalign.training.optimizer import adamw, set_learning_rate

TOKEN_BUDGETS = (1024, 4096, 16384)
"""Values of token_budget that training is tried with."""
REPEATS = 3
"""Times each thing is measured; the median counts."""


class BenchShape(Settings):
    """The shape of the data; token ids are random, because cost depends on lengths only."""

    prompts: int = Field(8, ge=1, description="prompts of one training step, and prompts sampled for")
    num_completions: int = Field(4, ge=2, description="K, the completions of each prompt")
    prompt_tokens: int = Field(350, ge=1, description="tokens of each prompt")
    completion_tokens: int = Field(40, ge=1, description="tokens of each completion")


@dataclass(frozen=True, slots=True)
class Rate:
    """A measured speed. `tokens` counts each prompt once and every completion; `flops` is the necessary work."""

    what: str
    seconds: float
    tokens: int
    flops: float


def bench(
    settings: ModelSettings, shape: BenchShape, *, tokenizer: str | None = None, budgets: Sequence[int] = TOKEN_BUDGETS
) -> tuple[float, list[Rate]]:
    """Load the model, train on it for a few steps with each token budget and sample from it; nothing is written.

    Returns the best rate of its matrix products in operations/s, and what was measured. `tokenizer` is the source of a
    tokenizer, by default the one that comes with the model. A shape that exceeds its positions is an `InputError`.
    """
    loaded = load_tokenizer(tokenizer or str(settings.source), trust_remote_code=settings.trust_remote_code)
    torch.manual_seed(0)
    model: Any = load_policy(settings, loaded)
    limit = max_positions(model)
    if limit is not None and shape.prompt_tokens + shape.completion_tokens > limit:
        raise InputError(
            f"A prompt of {shape.prompt_tokens} and a completion of {shape.completion_tokens} tokens do not fit into "
            f"the model's {limit} positions; ask for shorter ones."
        )
    sampling = [measure_sampling(model, loaded, shape)]
    if model.dtype == torch.float32:
        sampling.append(measure_sampling(model, loaded, shape, "bf16"))
    return matmul_peak(model), [*measure_training(model, shape, budgets), *sampling]


def measure_training(model: Any, shape: BenchShape, budgets: Sequence[int] = TOKEN_BUDGETS) -> list[Rate]:
    """Seconds of a whole EXO step: forward, backward, clipping, AdamW. The model's weights change a little."""
    settings = Matching(learning_rate=1e-6, batch_prompts=shape.prompts)
    groups = with_reference_logp(model, _groups(model, shape), settings, temperature=1.0)
    task = MatchingTask(EpochBatches(groups, batch_prompts=shape.prompts, epochs=1, seed=0), settings, 1.0)
    policy = PackedPolicy(model).train()
    optimizer = adamw(policy, betas=settings.adam_betas, weight_decay=0.0, device=model.device)
    set_learning_rate(optimizer, settings.learning_rate)
    tokens, work = sum(group.num_tokens for group in groups), training_flops(model, groups)

    def step(budget: int) -> None:
        for part in microbatches(groups, token_budget=budget):
            loss, _ = task.loss(policy, part)
            (loss / len(groups)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(budgets[0])  # the first step allocates what later ones reuse
    times = [[timed(partial(step, budget), model.device) for budget in budgets] for _ in range(REPEATS)]
    model.eval()
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    rates = zip(budgets, medians, strict=True)
    return [Rate(f"training, token_budget {budget}", took, tokens, work) for budget, took in rates]


def measure_sampling(
    model: Any, tokenizer: PreTrainedTokenizerBase, shape: BenchShape, precision: Literal["fp32", "bf16"] = "fp32"
) -> Rate:
    """Seconds to draw K completions of each prompt; one that ends early counts as long as it became."""
    prompts = [
        Record(str(group.index), "", prompt_ids=tuple(group.prompt_ids.tolist())) for group in _groups(model, shape)
    ]
    settings = SampleSettings(
        num_completions=shape.num_completions,
        max_new_tokens=shape.completion_tokens,
        max_prompt_tokens=shape.prompt_tokens,
        precision=precision,
    )
    what = "sampling, drawn tokens" + (", precision bf16" if precision == "bf16" else "")
    rates = []
    for seed in range(REPEATS):
        sampler = open_sampler(model, tokenizer, settings, temperature=1.0, seed=seed)
        drawn: list[Record] = []
        seconds = timed(lambda: drawn.extend(sampler.sample(prompts)), model.device)  # noqa: B023  # called at once
        work = forward_flops(model, [group_of(record, index) for index, record in enumerate(drawn)])
        tokens = sampler.counts["completion_tokens"]
        rates.append(Rate(what, seconds, tokens, work))
    return sorted(rates, key=lambda rate: rate.tokens / rate.seconds)[len(rates) // 2]


def bench_table(shape: BenchShape, peak: float, rates: Sequence[Rate]) -> Table:
    """The result for a terminal: tokens per second, and the share of the peak that necessary work reached."""
    table = Table(
        title=f"{shape.prompts} prompts × {shape.num_completions} completions, "
        f"{shape.prompt_tokens} + {shape.completion_tokens} tokens, {torch.get_num_threads()} CPU threads",
        caption=f"Best rate of this model's matrix products: {peak / 1e9:,.0f} GFLOP/s. The share counts each prompt "
        "once, no padding, the head on completion tokens only.",
    )
    table.add_column("")
    for name in ("seconds", "tokens/s", "share of peak"):
        table.add_column(name, justify="right")
    for rate in rates:
        share = rate.flops / rate.seconds / peak
        table.add_row(rate.what, f"{rate.seconds:.3g}", f"{rate.tokens / rate.seconds:,.0f}", f"{share:.0%}")
    return table


def _groups(model: Any, shape: BenchShape) -> list[Group]:
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def ids(length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (length,), generator=draw)

    groups = []
    for index in range(shape.prompts):
        completions = tuple(ids(shape.completion_tokens) for _ in range(shape.num_completions))
        rewards = torch.randn(shape.num_completions, generator=draw)
        groups.append(Group(index, ids(shape.prompt_tokens), completions, rewards=rewards))
    return groups
