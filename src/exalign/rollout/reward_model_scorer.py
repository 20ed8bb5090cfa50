"""A trained reward model as a scorer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.record import Record
from exalign.data.tokenization import TokenLimits
from exalign.errors import InputError
from exalign.models.heads import completion_outputs
from exalign.rollout.limits import kept_limits
from exalign.rollout.retokenized import max_positions, num_labels, outputs_in_batches, retokenize
from exalign.rollout.scorer import check_rewards


class RewardModelScorer:
    """r(x, y) of a sequence classifier with one label: its scalar head on the last token of prompt + completion.

    Texts are tokenised with the reward model's own tokenizer, and cut to `limits`. By default those are the limits that
    the model was trained with, which one that was trained here carries; the text for another is cut only where it has
    no positions left. `token_budget` sets the tokens computed at once and
    changes no reward beyond rounding. `counts` says what was cut. Another number of labels, or
    a model that is not causal, is an `InputError`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limits: TokenLimits | None = None,
        token_budget: int = 4096,
    ) -> None:
        if num_labels(model) != 1:
            raise InputError(
                f"A reward model has one label, but this one has {num_labels(model)}; "
                "score with the log-odds of a classifier instead."
            )
        if not hasattr(model, "score"):
            raise InputError("A reward model must be a causal model with a scalar head named score; this one is not.")
        self.counts: Counter[str] = Counter()
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._limits = limits or kept_limits(model)
        self._token_budget = token_budget

    def score(self, records: Sequence[Record]) -> list[list[float]]:
        """One list of K rewards per record; a reward that is not finite is an `InputError` that names it."""
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
        outputs = outputs_in_batches(
            lambda batch: completion_outputs(self._model, batch), groups, token_budget=self._token_budget
        )
        return check_rewards([row[:, 0].tolist() for row in outputs], records, source="The reward model")
