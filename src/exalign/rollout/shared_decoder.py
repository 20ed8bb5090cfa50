"""Decoding in which each prompt is read once and its keys are shared by its K completions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from exalign.rollout.plain_decoder import Branches, PlainDecoder
from exalign.rollout.shared_attention import Layout, SharedCache, UnsupportedAttentionError, shared_attention


class SharedDecoder:
    """One forward pass per step over a packed row: the entering prompts, then one token of each live completion."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def step(self, groups: Sequence[Branches]) -> Tensor:
        """Logits of the next tokens; entering groups must stand before the running ones."""
        entering = [group for group in groups if group.tokens is None]
        running = [group for group in groups if group.tokens is not None]
        for group in entering:
            group.cache = SharedCache(num_rows=group.num_completions, prompt_length=len(group.prompt_ids))
        ids = [group.prompt_ids for group in entering]
        positions = [torch.arange(len(prompt)) for prompt in ids]
        last = torch.tensor([len(prompt) for prompt in ids], dtype=torch.long).cumsum(0) - 1
        for group in running:
            assert group.tokens is not None
            ids.append(group.tokens)
            positions.append(torch.full((len(group.tokens),), group.cache.prompt_length + group.cache.length))
        row = torch.cat(ids)
        start = int(last[-1]) + 1 if entering else 0
        wanted = torch.cat([last, torch.arange(start, len(row))]).to(row.device)
        layout = Layout([group.cache for group in entering], [group.cache for group in running])
        with shared_attention(self._model, layout):
            output = self._model(
                input_ids=row[None],
                position_ids=torch.cat(positions).to(row.device)[None],
                use_cache=False,
                logits_to_keep=wanted,
            )
        for group in running:
            group.cache.length += 1
        return output.logits[0]

    def keep(self, group: Branches, rows: Sequence[int]) -> None:
        group.cache.keep(list(rows))


def why_not_shared(model: Any, *, longest: int) -> str | None:
    """Why `SharedDecoder` cannot serve this model, or None where it can.

    Some architectures take part in the attention interface and yet keep state or build masks elsewhere. So the
    answer is found by trying: a short prompt with two completions, step by step, must give the plain decoder's logits.
    """
    accepted = inspect.signature(model.forward).parameters
    if not {"position_ids", "logits_to_keep"} <= set(accepted):
        return "its forward does not take position_ids and logits_to_keep"
    window = getattr(model.config, "attention_chunk_size", None)
    if window is not None and window < longest:
        return "it attends within chunks"
    try:
        return None if _agrees(model) else "its logits differ from a plain forward pass"
    except (UnsupportedAttentionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]


def _agrees(model: Any) -> bool:
    device = model.device
    vocabulary = model.get_input_embeddings().num_embeddings
    prompts = [(torch.arange(start, start + length) % vocabulary).to(device) for start, length in ((0, 5), (3, 2))]
    shared, plain = SharedDecoder(model), PlainDecoder(model)
    trial = {decoder: [Branches(prompt, 2) for prompt in prompts] for decoder in (shared, plain)}
    # Half precision rounds differently in every kernel: a wrong mask is off by far more than this.
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.3
    for step in range(3):
        logps = {decoder: decoder.step(groups).float().log_softmax(-1) for decoder, groups in trial.items()}
        if not torch.allclose(logps[shared], logps[plain], atol=tolerance, rtol=0):
            return False
        for groups in trial.values():
            for group in groups:
                group.tokens = torch.tensor([step % vocabulary, (7 * step + 1) % vocabulary], device=device)
    return True
