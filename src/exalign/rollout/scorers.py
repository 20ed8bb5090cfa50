"""What gives completions their rewards: reward models, classifiers, Python functions, and weighted sums of them."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.batching import Group
from exalign.data.record import Completion, Record, spoken
from exalign.data.tokenization import TokenLimits, UnfitError, as_conversation, tokenize_record, with_token_ids
from exalign.device import device
from exalign.errors import InputError, first_line
from exalign.models.heads import completion_outputs
from exalign.models.loading import load_scoring_model, load_tokenizer
from exalign.models.memory import computed, is_out_of_memory, release_memory, room_for
from exalign.models.sizes import reading_budget
from exalign.rollout.own_modules import from_here, own_module
from exalign.rollout.settings import OneScorer, ScorerSettings

logger = logging.getLogger(__name__)

_LIMITS = "exalign_limits"
_POSITIVE = {"positive", "pos", "good", "1", "label_1"}
"""What the label of a good text is called; the last is what transformers calls the second of labels without names."""


class Scorer(Protocol):
    """Gives each completion a reward r(x, y): a finite number, higher is better.

    `score` returns one list per record, as long as the record has completions, in the same order. A completion's
    reward depends on its prompt and itself alone, never on what else is scored with it, but where a prompt is cut so
    that its longest completion fits, which is counted.
    """

    def score(self, records: Sequence[Record]) -> list[list[float]]: ...


def scored(scorer: Scorer, records: Sequence[Record], counts: Counter[str]) -> list[Record]:
    """The records with the scorer's rewards, and with the parts of a sum where it is one.

    What the scorer cut to read it, which changes a reward and no record, is added to `counts`: `prompts_cut_in_scoring`
    and `completions_cut_in_scoring`.
    """
    before = _cuts(scorer)
    if isinstance(scorer, WeightedSum):
        parts = scorer.parts(records)
        rewards = scorer.total(parts)
        records = [record.with_each("parts", row) for record, row in zip(records, parts, strict=True)]
    else:
        rewards = scorer.score(records)
    for name, number in (_cuts(scorer) - before).items():
        counts[f"{name}_in_scoring"] += number
    rewards = check_rewards(rewards, records, source=type(scorer).__name__)  # of a sum, and of others' scorers
    return [record.with_rewards(row) for record, row in zip(records, rewards, strict=True)]


def _cuts(scorer: Scorer) -> Counter[str]:
    """What a scorer has cut so far; those of other people's making may not say."""
    return Counter(getattr(scorer, "counts", {}))


def open_scorer(settings: ScorerSettings | OneScorer, trained_here: Callable[[str], str] | None = None) -> Scorer:
    """The scorer that a recipe names, ready to score.

    `trained_here` gives the folder of a stage's model; a recipe of a run has one. A model that was trained by exalign
    carries the limits that it was trained with, and reads nothing longer.
    """
    if isinstance(settings, ScorerSettings) and settings.sum is not None:
        scorers = [(part.weight, open_scorer(part, trained_here)) for part in settings.sum]
        return WeightedSum(dict(zip(part_names(settings.sum), scorers, strict=True)))
    if settings.function is not None:
        return FunctionScorer(settings.function)
    source = settings.reward_model or settings.classifier
    if settings.stage is not None:
        assert trained_here is not None
        source = trained_here(settings.stage)
    assert source is not None
    tokenizer = load_tokenizer(source, speaks=False)
    labels = 1 if settings.reward_model is not None else None
    with room_for(f"The scorer {source}"):
        model: Any = load_scoring_model(source, tokenizer, num_labels=labels, dtype=settings.dtype)
        model.to(device())
    if settings.classifier is not None or settings.stage == "oracle":
        positive = 1 if settings.stage == "oracle" else settings.positive
        return ClassifierScorer(model, tokenizer, positive)
    return RewardModelScorer(model, tokenizer)


def check_scorer(settings: ScorerSettings, records: Sequence[Record]) -> None:
    """Raise before any sampling what scoring would raise after it: every scorer is opened and scores the `records`.

    Those of the run's own stages do not exist yet.
    """
    records = [r if r.completions else replace(r, completions=(Completion("Yes."),)) for r in records]
    for part in settings.sum or (settings,):
        if part.stage is None:
            scorer = open_scorer(part)
            if isinstance(scorer, FunctionScorer):
                scorer.check_columns(records)
            scorer.score(records)


def part_names(parts: Sequence[OneScorer]) -> list[str]:
    """A name for each scorer of a sum, all different: the stage, the run's or model's last name, the function's."""
    names: list[str] = []
    for part in parts:
        full = part.stage or part.function or str(part.reward_model or part.classifier)
        name = next((n for n in reversed(Path(full).parts) if n not in ("model", "reward", "oracle")), full)
        names.append(name if name not in names else f"{name}#{len(names) + 1}")
    return names


def part_means(records: Sequence[Record]) -> dict[str, float]:
    """The mean of each part of the rewards over all completions; empty where the scorer is no sum."""
    sums: Counter[str] = Counter()
    completions = [completion for record in records for completion in record.completions if completion.parts]
    for completion in completions:
        sums.update(completion.parts)  # a Counter adds floats as well
    return {name: value / len(completions) for name, value in sums.items()}


class RewardModelScorer:
    """r(x, y) of a sequence classifier with one label: its scalar head on the last token of prompt + completion.

    Another number of labels is an `InputError`. Texts are tokenised with the model's own tokenizer, and cut to
    `limits`, those that the model was trained with, which one that was trained here carries; the text for another is
    cut only where it has no positions left. `token_budget` tokens are computed at once, which changes no reward beyond
    rounding. `counts` says what was cut.

    Causal models read the last token of prompt and completion, tokenised apart; encoders (BERT, DeBERTa, …) both as one
    text with their special tokens, cut on its left where it is too long. Where a model that was made elsewhere pads
    with the id that ends a text, the last token is the one before: so its own forward reads it, and so its makers
    trained it.
    """

    _called = "The reward model"
    _positive: int | None = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if self._positive is None and model.config.num_labels != 1:
            raise InputError(
                f"A reward model has one label, but {model.config.name_or_path or 'this one'} has "
                f"{model.config.num_labels}; score with the log-odds of a classifier instead."
            )
        self.counts: Counter[str] = Counter()
        self._model: Any = model.eval()
        self._tokenizer = tokenizer
        self.limits = kept_limits(model)
        self.token_budget = reading_budget(model, "auto")
        padding = model.config.get_text_config().pad_token_id
        self._unread = padding if padding == tokenizer.eos_token_id else None

    def score(self, records: Sequence[Record]) -> list[list[float]]:
        """One list of K rewards per record; a reward that is not finite is an `InputError` that names it."""
        # Causal classifiers of transformers call their head `score`; those that pool a whole text have another.
        rows = self._causal(records) if hasattr(self._model, "score") else self._encoder(records)
        values = [row[:, 0] if self._positive is None else log_odds(row, self._positive) for row in rows]
        return check_rewards([row.tolist() for row in values], records, source=self._called)

    def _causal(self, records: Sequence[Record]) -> list[Tensor]:
        groups = [self._group(record, index) for index, record in enumerate(records)]
        if self._unread is not None:
            groups = [_without_end(group, self._unread) for group in groups]

        def outputs(part: Sequence[Group]) -> Tensor:
            return completion_outputs(self._model, part).double().cpu()

        found: dict[int, Tensor] = {}
        with torch.inference_mode():
            for batch, values in computed(outputs, groups, token_budget=self.token_budget):
                found.update({g.index: row[: g.num_completions] for g, row in zip(batch, values, strict=True)})
        return [found[group.index] for group in groups]

    def _group(self, record: Record, index: int) -> Group:
        """The record's texts in the tokens of this model, whatever ids it carries.

        A completion that ended has its end-of-sequence id, one that was cut by a limit has none. Without limits, texts
        are cut only to the model's positions: the prompt on its left, once for all K completions. What cannot stand
        behind a prompt of this tokenizer's chat template (`conversations_read_whole`) is read as the template writes
        the whole conversation.
        """
        tokenizer, counts, limits, positions = self._tokenizer, self.counts, self.limits, max_positions(self._model)
        record = record.as_texts()
        try:
            record = with_token_ids(record, tokenizer, counts)
        except UnfitError:
            record = as_conversation(record, tokenizer)
            counts["conversations_read_whole"] += 1
        if limits is None:
            whole = positions or 2**62
            longest = max((len(c.token_ids or ()) for c in record.completions), default=1)
            completion = min(longest, whole - 1)
            limits = TokenLimits.model_construct(max_prompt_tokens=whole - completion, max_completion_tokens=completion)
        return tokenize_record(record, tokenizer, index=index, limits=limits, counts=counts)

    def _encoder(self, records: Sequence[Record]) -> list[Tensor]:
        texts = []
        for record in records:
            prompt = record.prompt  # messages line by line
            start = prompt if isinstance(prompt, str) else "".join(f"{spoken(message)}\n" for message in prompt)
            texts += [start + completion.text for completion in record.completions]
        rows = self._encode(texts)
        logits = torch.empty(len(rows), self._model.config.num_labels, dtype=torch.float64)
        with torch.inference_mode():
            waiting = list(_similar_lengths(rows, self.token_budget))
            while waiting:
                batch = waiting.pop(0)
                try:
                    logits[batch] = self._logits([rows[i] for i in batch])
                    continue
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                if len(batch) == 1:
                    raise InputError(f"A text of {len(rows[batch[0]]):,} tokens alone does not fit in memory.")
                release_memory()
                middle = len(batch) // 2
                waiting[:0] = [batch[:middle], batch[middle:]]
        return list(logits.split([len(record.completions) for record in records]))

    def _logits(self, rows: list[list[int]]) -> Tensor:
        inputs = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        ids, mask = (inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask"))
        return self._model(input_ids=ids, attention_mask=mask).logits.double().cpu()

    def _encode(self, texts: list[str]) -> list[list[int]]:
        tokenizer: Any = copy.deepcopy(self._tokenizer)
        tokenizer.truncation_side = "left"
        limit = min(tokenizer.model_max_length, _encoder_positions(self._model))
        rows: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        for index, row in enumerate(rows):
            if len(row) > limit:
                rows[index] = tokenizer(texts[index], truncation=True, max_length=limit)["input_ids"]
                self.counts["texts_cut"] += 1
        return rows


class ClassifierScorer(RewardModelScorer):
    """r(x, y) = log p(positive | x, y) − log (1 − p(positive | x, y)), in nats, of the text prompt + completion.

    With logits z this is z_pos − logsumexp of the others; with two labels, their difference. `positive` is the name or
    the number of a label (see `positive_label`). A model with one label is an `InputError`.
    """

    _called = "The classifier"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, positive: str | int | None = None
    ) -> None:
        self._positive = positive_label(model.config, positive)
        super().__init__(model, tokenizer)


def log_odds(logits: Tensor, positive: int) -> Tensor:
    """z_pos − logsumexp of the other labels: `[…, num_labels]` → `[…]`, in nats.

    >>> log_odds(torch.tensor([[0.5, 2.0]]), 1)
    tensor([1.5000])
    """
    others = torch.cat([logits[..., :positive], logits[..., positive + 1 :]], dim=-1)
    return logits[..., positive] - others.logsumexp(-1)


def positive_label(config: PreTrainedConfig, wanted: str | int | None) -> int:
    """The number of a classifier's positive label: as `wanted` names or numbers it, else the one whose name says so.

    Where nobody said which, the one that was taken is told once; names that leave it open are an `InputError`.

    >>> positive_label(PreTrainedConfig(id2label={0: "POSITIVE", 1: "NEGATIVE"}), None)
    0
    """
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    source, listed = str(config.name_or_path or "the classifier"), ", ".join(f"{n} {name}" for n, name in names.items())
    if len(names) < 2:
        raise InputError(f"A classifier needs at least two labels, but {source} has one: use it as reward model.")
    if wanted is not None:
        text = str(wanted).casefold()
        found = [n for n, name in names.items() if name.casefold() == text] or [n for n in names if str(n) == text]
        if len(found) != 1:
            raise InputError(f"The positive label {wanted} does not exist; {source} has the labels {listed}.")
        return found[0]
    # "LABEL_1" says something where there are two of them only.
    known = _POSITIVE if len(names) == 2 else _POSITIVE - {"label_1", "1"}
    found = [number for number, name in names.items() if name.casefold() in known]
    if len(found) != 1:
        raise InputError(
            f"Which label of {source} is the positive one? It has {listed}; say so with the scorer's setting positive, "
            f"for example positive: {next(iter(names.values()))}."
        )
    _say_label(source, found[0], names[found[0]])
    return found[0]


@functools.cache  # once, though a scorer is opened before the work as well
def _say_label(source: str, number: int, name: str) -> None:
    said = "%s: the reward is the log-odds of label %d, %s, for nobody said which label is positive."
    logger.warning(said, source, number, name)


class WeightedSum:
    """r(x, y) = Σ w_i r_i(x, y) of named scorers, each with its weight in front."""

    def __init__(self, scorers: Mapping[str, tuple[float, Scorer]]) -> None:
        self._scorers = scorers

    @property
    def counts(self) -> Counter[str]:
        return sum((_cuts(scorer) for _, scorer in self._scorers.values()), Counter())

    def parts(self, records: Sequence[Record]) -> list[list[dict[str, float]]]:
        """For each completion the rewards of each scorer on its own, without its weight."""
        names, each = list(self._scorers), [scorer.score(records) for _, scorer in self._scorers.values()]
        return [[dict(zip(names, of, strict=True)) for of in zip(*row, strict=True)] for row in zip(*each, strict=True)]

    def total(self, parts: Sequence[Sequence[Mapping[str, float]]]) -> list[list[float]]:
        return [
            [sum(weight * one[name] for name, (weight, _) in self._scorers.items()) for one in row] for row in parts
        ]

    def score(self, records: Sequence[Record]) -> list[list[float]]:
        return self.total(self.parts(records))


class FunctionScorer:
    """Rewards from `function(prompts, completions, **columns)`, named as `module:function`, in one of two forms.

    By prompt: `prompts` is a list of B prompts, `completions` a list of B lists of texts; it returns B lists of as many
    numbers. By completion, as functions for TRL are written: a prompt and a text (a list of one message, where the
    prompt is messages) for each completion, and a number for each. The first result says which it is. Further
    parameters get the data's other columns of that name, with a value for each prompt, None where a row has none; with
    `**columns` it gets all of them. The module is looked for in the working directory too. A name that cannot be
    imported, a parameter that no column fills, whatever the function raises, a wrong number of rewards, and one that is
    not finite are `InputError`s that name file, function and row.
    """

    def __init__(self, name: str) -> None:
        self._function = _load(name)
        plain = inspect.unwrap(self._function)
        file = inspect.getsourcefile(plain) if inspect.isfunction(plain) or inspect.ismethod(self._function) else None
        self._name = f"{name} ({file})" if file else name
        self._takes = _columns(self._function, self._name)
        self._by_prompt = None if self._takes.by_place else False

    def score(self, records: Sequence[Record]) -> list[list[float]]:
        """One list of K rewards per record."""
        if not records:
            return []
        problems: list[InputError] = []
        for by_prompt in (True, False) if self._by_prompt is None else (self._by_prompt,):
            try:
                if (
                    self._by_prompt is None and len(records) > 1
                ):  # a paid judge is not asked all of it in the wrong form
                    self._rewards(records[:1], by_prompt=by_prompt)
                rewards = self._rewards(records, by_prompt=by_prompt)
            except InputError as error:
                problems.append(error)
            else:
                self._by_prompt = by_prompt
                return check_rewards(rewards, records, source=self._name)
        said = dict.fromkeys(map(str, problems))
        raise InputError(" With one text at a time instead: ".join(said)) from problems[-1]

    def _rewards(self, records: Sequence[Record], *, by_prompt: bool) -> list[list[Any]]:
        given = self._call(records, by_prompt=by_prompt)
        try:
            if by_prompt:
                return [_listed(values) for values in _listed(given)]
            flat = [float(value) for value in _listed(given)]
        except (TypeError, ValueError, OverflowError, RuntimeError):
            if given is None or inspect.iscoroutine(given):
                said = "returned None" if given is None else "is async, and is not awaited; give an ordinary function"
                raise InputError(f"{self._name} {said}.") from None
            wanted = "list of rewards per prompt, or one per" if by_prompt else "number per"
            raise InputError(f"{self._name} must return one {wanted} completion.") from None
        texts = sum(len(record.completions) for record in records)
        if len(flat) != texts:
            raise InputError(f"{self._name} gave {len(flat)} rewards for {texts} completions.")
        rest = iter(flat)
        return [[next(rest) for _ in record.completions] for record in records]

    def check_columns(self, records: Sequence[Record]) -> None:
        """An `InputError` where a column that the function needs is in none of the records."""
        given = _named(records)
        if missing := [name for name in self._takes.needed if name not in given]:
            there = f"there are {', '.join(given)}" if given else "there are none"
            raise InputError(f"{self._name} asks for the column {missing[0]}, which the data does not have; {there}.")

    def _call(self, records: Sequence[Record], *, by_prompt: bool) -> Any:
        takes = self._takes
        rows = records if by_prompt else [record for record in records for _ in record.completions]
        prompts = [record.prompt for record in rows]
        texts: list[Any] = [[c.text for c in record.completions] for record in records]
        if not by_prompt:
            told = zip(prompts, chain.from_iterable(texts), strict=True)
            texts = [text if isinstance(p, str) else [{"role": "assistant", "content": text}] for p, text in told]
        columns = {
            name: [(record.columns or {}).get(name) for record in rows]
            for name in dict.fromkeys(takes.needed) | _named(records)
            if (takes.all or name in takes.named) and name not in ("prompts", "completions")
        }
        own = {"completions": texts} | ({"prompts": prompts} if takes.all or "prompts" in takes.named else {})
        by_place, by_name = ([prompts, texts], {}) if takes.by_place else ([], own)
        try:
            with from_here():  # what it imports only now may lie beside it
                found = self._function(*by_place, **by_name, **columns)
                return list(found) if isinstance(found, Iterator) else found
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # whatever the function does
            if len(records) > 1:
                for record in records:
                    self._call([record], by_prompt=by_prompt)  # raises the sentence below for the row that fails alone
            ids = records[0].id if len(records) == 1 else f"{records[0].id} to {records[-1].id}"
            line = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(line.filename).name}, line {line.lineno}"
            said = f"{type(error).__name__}: {first_line(error)[:200]}"
            raise InputError(f"{self._name} failed on record {ids}, at {where}: {said}.") from error


def _listed(values: Any) -> list[Any]:
    """The values that a function gave, one after the other; a text, a dictionary or a set is not a list of rewards."""
    if isinstance(values, str | bytes | Mapping | Set):
        raise TypeError
    return list(values)


def _named(records: Sequence[Record]) -> dict[str, None]:
    """The further columns of the records."""
    return dict.fromkeys(name for record in records for name in record.columns or ())


def _load(name: str) -> Callable[..., Any]:
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise InputError(f"A reward function is named as module:function, not {name!r}.")
    module = own_module(module_name, f"The reward function {name}")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"The module {module_name} has no function {function_name}.")
    return function


@dataclass(frozen=True, slots=True)
class _Takes:
    """What a reward function takes: columns by name, those it needs, whether all there are; and prompts and texts by
    their place, or else as `prompts` and `completions`."""

    named: frozenset[str]
    needed: tuple[str, ...]
    all: bool
    by_place: bool


def _columns(function: Any, name: str) -> _Takes:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # one that is not written in Python does not say
        return _Takes(frozenset(), (), all=False, by_place=True)
    kinds = [parameter.kind for parameter in parameters]
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY]
    by_place = len(places) >= 2 or inspect.Parameter.VAR_POSITIONAL in kinds
    if "completions" in known and [place.name for place in places[:2]] != ["prompts", "completions"]:
        by_place = False
    elif not by_place:
        raise InputError(f"{name} must take prompts and completions as its first two parameters.")
    first = places[:2] if by_place else [p for p in parameters if p.name == "completions"]
    further = [p for p in parameters if p not in first and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = tuple(p.name for p in further if p.default is p.empty and (by_place or p.name != "prompts"))
    return _Takes(frozenset(p.name for p in further), needed, inspect.Parameter.VAR_KEYWORD in kinds, by_place)


def check_rewards(rewards: Sequence[Sequence[float]], records: Sequence[Record], *, source: str) -> list[list[float]]:
    """The rewards as lists of floats; a wrong count, a value that is no number, NaN or infinity is an `InputError`.

    >>> record = Record(id="7", prompt="Hi", completions=(Completion("a"), Completion("b")))
    >>> check_rewards([[1, 2.5]], [record], source="length")
    [[1.0, 2.5]]
    >>> check_rewards([[1.0, float("nan")]], [record], source="length")
    Traceback (most recent call last):
    exalign.errors.InputError: length gave the reward nan to completion 1 of record 7; rewards must be finite numbers.
    """
    if len(rewards) != len(records):
        raise InputError(f"{source} gave rewards for {len(rewards)} prompts, but there are {len(records)}.")
    checked = []
    for values, record in zip(rewards, records, strict=True):
        if len(values) != len(record.completions):
            raise InputError(
                f"{source} gave {len(values)} rewards to record {record.id}, which has {len(record.completions)} "
                "completions."
            )
        checked.append([_finite(value, record, position, source) for position, value in enumerate(values)])
    return checked


def _finite(value: object, record: Record, position: int, source: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{source} gave the reward {value} to completion {position} of record {record.id}; "
            "rewards must be finite numbers."
        )
    return number


def keep_limits(model: Any, limits: TokenLimits) -> None:
    """Have the model carry the limits that it is about to be trained with, in whatever `config.json` it is saved with.

    A reward model that was trained on prompts cut to 256 tokens says something else of one with 300: further positions
    are as it was initialised there. So what scores with it, in whatever run, has to cut as its training did.
    """
    setattr(model.config, _LIMITS, limits.model_dump())


def kept_limits(model: Any) -> TokenLimits | None:
    """The limits that a model was trained with; None where it does not say, as one that was made elsewhere."""
    values = getattr(model.config, _LIMITS, None)
    if values is None:
        return None
    try:
        return TokenLimits.model_validate(values)
    except ValidationError:
        name = getattr(model.config, "name_or_path", "") or "the model"
        raise InputError(f"config.json of {name} has {_LIMITS} that are no limits: {str(values)[:100]}") from None


def _without_end(group: Group, unread: int) -> Group:
    """The group without the ids `unread` at the end of its completions; the prompt lends them its last token."""

    def read(ids: Tensor) -> Tensor:
        kept = (ids != unread).nonzero()
        return ids[: int(kept[-1]) + 1] if len(kept) else ids[:1]

    if len(group.prompt_ids) == 1:
        return replace(group, completion_ids=tuple(read(ids) for ids in group.completion_ids))
    whole = tuple(read(torch.cat([group.prompt_ids[-1:], ids])) for ids in group.completion_ids)
    return replace(group, prompt_ids=group.prompt_ids[:-1], completion_ids=whole)


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


def max_positions(model: Any) -> int | None:
    """The longest text a model can read, in tokens, or None where it has no limit (XLNet's config says −1)."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if found and found > 0 else None


def _encoder_positions(model: Any) -> int:
    """The longest text: RoBERTa and its kin number positions from the padding id + 1, which costs them that many."""
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    offset = getattr(embeddings, "padding_idx", None)
    return (max_positions(model) or 2**62) - (0 if offset is None else offset + 1)
