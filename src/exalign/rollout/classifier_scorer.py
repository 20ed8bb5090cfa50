"""The log-odds of a classifier as a reward: the oracle of the controlled-sentiment experiment."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.record import Record
from exalign.data.tokenization import TokenLimits
from exalign.errors import InputError
from exalign.models.heads import completion_outputs
from exalign.rollout.limits import kept_limits
from exalign.rollout.retokenized import max_positions, num_labels, outputs_in_batches, retokenize
from exalign.rollout.scorer import check_rewards


class ClassifierScorer:
    """r(x, y) = log p(positive | x, y) − log (1 − p(positive | x, y)), in nats, of the text prompt + completion.

    With logits z this is z_pos − logsumexp of the others; with two labels, their difference. Causal classifiers read
    the last token of prompt and completion, tokenised apart; encoders (BERT, DistilBERT, RoBERTa and alike) read both
    as one text with their special tokens, cut on its left where it is too long. Texts are cut to `limits`, by default
    those that the model was trained with (see `RewardModelScorer`). `counts` says what was cut. A model with one label,
    or a `positive_label` it does not have, is an `InputError`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        positive_label: int = 1,
        *,
        limits: TokenLimits | None = None,
        token_budget: int = 4096,
    ) -> None:
        labels = num_labels(model)
        if labels < 2:
            raise InputError("A classifier needs at least two labels, but this model has one: use it as reward model.")
        if not 0 <= positive_label < labels:
            raise InputError(f"The positive label {positive_label} does not exist; the classifier has {labels} labels.")
        self.counts: Counter[str] = Counter()
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._positive = positive_label
        self._limits = limits or kept_limits(model)
        self._token_budget = token_budget

    def score(self, records: Sequence[Record]) -> list[list[float]]:
        """One list of K log-odds per record."""
        # Causal classifiers of transformers call their head `score`; those that pool a whole text have another.
        logits = self._causal(records) if hasattr(self._model, "score") else self._encoder(records)
        rewards = [log_odds(row, self._positive).tolist() for row in logits]
        return check_rewards(rewards, records, source="The classifier")

    def _causal(self, records: Sequence[Record]) -> list[Tensor]:
        groups = [
            retokenize(
                record,
                self._tokenizer,
                index=index,
                limits=self._limits,
                positions=max_positions(self._model),
                counts=self.counts,
            )
            for index, record in enumerate(records)
        ]
        return outputs_in_batches(
            lambda batch: completion_outputs(self._model, batch), groups, token_budget=self._token_budget
        )

    def _encoder(self, records: Sequence[Record]) -> list[Tensor]:
        texts = [whole_text(record, completion.text) for record in records for completion in record.completions]
        rows = self._encode(texts)
        logits = torch.empty(len(rows), num_labels(self._model), dtype=torch.float64)
        with torch.inference_mode():
            for batch in _similar_lengths(rows, self._token_budget):
                inputs = self._tokenizer.pad({"input_ids": [rows[i] for i in batch]}, return_tensors="pt")
                ids, mask = (inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask"))
                logits[batch] = self._model(input_ids=ids, attention_mask=mask).logits.double().cpu()
        return list(logits.split([len(record.completions) for record in records]))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        tokenizer: Any = copy.deepcopy(self._tokenizer)
        tokenizer.truncation_side = "left"
        limit = min(tokenizer.model_max_length, _encoder_positions(self._model))
        rows: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
        for index, row in enumerate(rows):
            if len(row) > limit:
                rows[index] = tokenizer(texts[index], truncation=True, max_length=limit)["input_ids"]
                self.counts["texts_cut"] += 1
        return rows


def log_odds(logits: Tensor, positive: int) -> Tensor:
    """z_pos − logsumexp of the other labels: `[…, num_labels]` → `[…]`, in nats.

    >>> log_odds(torch.tensor([[0.5, 2.0]]), 1)
    tensor([1.5000])
    """
    others = torch.cat([logits[..., :positive], logits[..., positive + 1 :]], dim=-1)
    return logits[..., positive] - others.logsumexp(-1)


def whole_text(record: Record, completion: str) -> str:
    """The text an encoder reads: prompt and completion as they follow each other; messages line by line."""
    if isinstance(record.prompt, str):
        return record.prompt + completion
    return "\n".join([*(message["content"] for message in record.prompt), completion])


def _similar_lengths(rows: Sequence[Sequence[int]], token_budget: int) -> Iterator[list[int]]:
    """Positions of `rows` in batches of at most `token_budget` tokens with padding, the shortest rows first."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and len(rows[index]) * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _encoder_positions(model: Any) -> int:
    """The longest text: RoBERTa and its kin number positions from the padding id + 1, which costs them that many."""
    limit = max_positions(model)
    if limit is None:
        return 2**62
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    offset = getattr(embeddings, "padding_idx", None)
    return limit if offset is None else limit - offset - 1
