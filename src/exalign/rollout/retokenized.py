"""Texts in the tokens of the model that scores them, cut to what it can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group
from exalign.data.record import Record
from exalign.data.tokenization import TokenLimits, completion_token_ids, tokenize_record
from exalign.models.memory import computed


def retokenize(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    *,
    index: int,
    limits: TokenLimits | None,
    positions: int | None,
    counts: Counter[str],
) -> Group:
    """The group of a record's texts in the tokens of `tokenizer`, whatever ids the record carries.

    A completion that ended has its end-of-sequence id, one that was cut by a limit has none. Without `limits`, texts
    are cut only to the model's `positions`: the prompt on its left, once for all K completions. Cuts are counted in
    `counts` (`prompts_cut`, `completions_cut`).
    """
    bare = tuple(
        replace(completion, token_ids=None, logprob=None, reference_logprob=None) for completion in record.completions
    )
    record = replace(record, prompt_ids=None, completions=bare)
    longest_completion = longest_prompt = positions or 2**62
    if limits is not None:
        longest_prompt, longest_completion = limits.max_prompt_tokens, limits.max_completion_tokens
    elif positions is not None:
        longest_completion = positions - 1
        tokens = max(len(completion_token_ids(record, completion, tokenizer)) for completion in bare)
        longest_prompt = positions - min(tokens, longest_completion)
    return tokenize_record(
        record,
        tokenizer,
        index=index,
        max_prompt_tokens=longest_prompt,
        max_completion_tokens=longest_completion,
        counts=counts,
    )


def outputs_in_batches(
    outputs: Callable[[Sequence[Group]], Tensor], groups: Sequence[Group], *, token_budget: int
) -> list[Tensor]:
    """`outputs(groups) [B, K, num_labels]` over micro-batches of `groups`; `[K, num_labels]` float64 for each group."""
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for batch, values in computed(lambda part: outputs(part).double().cpu(), groups, token_budget=token_budget):
            found.update({group.index: row[: group.num_completions] for group, row in zip(batch, values, strict=True)})
    return [found[group.index] for group in groups]


def num_labels(model: Any) -> int:
    """The number of labels of a sequence classifier, adapters or not."""
    return int(model.config.num_labels)


def max_positions(model: Any) -> int | None:
    """The longest text a model can read, in tokens, or None where it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
