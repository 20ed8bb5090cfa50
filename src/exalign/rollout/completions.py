"""What every sampler makes of the ids that it drew, and which ids end a completion."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from exalign.data.record import Completion
from exalign.data.tokenization import eos_id
from exalign.storage import read_object


def end_ids(more: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a completion: the tokenizer's, and `more`, the model's generation settings' (an id, ids, None).

    >>> from types import SimpleNamespace
    >>> sorted(end_ids([7, 2], SimpleNamespace(eos_token_id=2)))
    [2, 7]
    """
    more = [] if more is None else [more] if isinstance(more, int) else list(more)
    return frozenset([eos_id(tokenizer), *more])


def saved_end_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The same for a model that lies in a folder."""
    path = folder / "generation_config.json"
    return end_ids(read_object(path).get("eos_token_id") if path.exists() else None, tokenizer)


def completion_of(
    ids: Sequence[int], logprob: float, ends: Collection[int], tokenizer: PreTrainedTokenizerBase
) -> Completion:
    """The completion of ids that were drawn: one that ended keeps the id that ended it, and its text goes without."""
    stopped = ids[-1] in ends
    text = tokenizer.decode(
        list(ids[:-1] if stopped else ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return Completion(text, tuple(ids), "stop" if stopped else "length", logprob)
