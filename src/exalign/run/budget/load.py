"""How much there is to compute: prompts, completions of each, and their lengths, by the recipe and the assumptions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from exalign.data.batching import Group
from exalign.data.reading import DataSettings, read_source
from exalign.errors import InputError
from exalign.run.budget.assumptions import Assumptions
from exalign.run.recipe import Recipe

PUBLISHED_ROWS = {
    ("stanfordnlp/imdb", "train"): 25_000,
    ("stanfordnlp/imdb", "test"): 25_000,
    ("trl-lib/tldr", "train"): 116_722,
    ("trl-lib/tldr", "validation"): 6_447,
    ("trl-lib/tldr", "test"): 6_553,
    ("trl-lib/tldr-preference", "train"): 92_858,
    ("trl-lib/tldr-preference", "validation"): 86_086,
    ("hh-rlhf/helpful-base/train.jsonl.gz", ""): 43_835,
    ("hh-rlhf/helpful-base/test.jsonl.gz", ""): 2_354,
}
"""Rows of the data sets that the shipped recipes name, by hub name (or the file's last folders) and split."""

UNKNOWN_ROWS = 10_000
"""Taken for a data set that is neither here nor in the table; the plan says so."""


@dataclass(frozen=True, slots=True)
class Load:
    """`prompts` groups of `completions` completions (K), all of the mean lengths; no group is over the longest ones."""

    prompts: int
    completions: int
    prompt_tokens: int
    completion_tokens: int
    longest_prompt: int
    longest_completion: int

    @property
    def tokens(self) -> int:
        """All of them, each prompt once."""
        return self.prompts * self.group_tokens

    @property
    def group_tokens(self) -> int:
        return self.prompt_tokens + self.completions * self.completion_tokens

    @property
    def longest_group(self) -> int:
        return self.longest_prompt + self.completions * self.longest_completion

    def group(self) -> Group:
        """One group of the mean lengths, whose ids mean nothing: what `models.flops` counts."""
        completion = torch.zeros(self.completion_tokens, dtype=torch.long)
        return Group(0, torch.zeros(self.prompt_tokens, dtype=torch.long), (completion,) * self.completions)

    def alone(self) -> Load:
        """The same completions, each with a prompt of its own: what a model reads that cannot share prompts."""
        return replace(self, prompts=self.prompts * self.completions, completions=1)


@dataclass
class Loads:
    """The loads of a recipe's stages; `said` collects what had to be assumed, each sentence once."""

    recipe: Recipe
    assumed: Assumptions
    said: dict[str, None] = field(default_factory=dict)
    _known: dict[str, tuple[int, str]] = field(default_factory=dict)  # a file is read once, however many stages ask

    def supervised(self) -> Load:
        """Texts, K = 1: of data.sft, or the preferred completions of the preferences."""
        data = self.recipe.data
        source, name = (data.sft, "data.sft") if data.sft is not None else (data.preferences, "data.preferences")
        load = self._given(source, name, 1)
        if self.recipe.sft is None or not self.recipe.sft.train_on_prompts:
            return load
        whole, longest = load.group_tokens - 1, load.longest_group - 1  # every token but the first is a target
        return replace(load, prompt_tokens=1, completion_tokens=whole, longest_prompt=1, longest_completion=longest)

    def labelled(self) -> Load:
        oracle = self.recipe.oracle
        assert oracle is not None
        load = self._given(self.recipe.data.labelled, "data.labelled", 1)
        longest = replace(load, longest_prompt=min(load.longest_prompt, oracle.max_tokens))
        completion = min(self._completion(oracle.max_tokens), oracle.max_tokens)
        return replace(longest, completion_tokens=completion, longest_completion=oracle.max_tokens)

    def pairs(self) -> Load:
        """The preferences: given, or two samples of the supervised model for each prompt."""
        if self.recipe.data.preferences is not None:
            return self._given(self.recipe.data.preferences, "data.preferences", 2)
        return self.sampled(2)

    def rewarded(self) -> Load:
        """What has rewards: given, or sampled and scored. Given rows are taken to have as many completions."""
        completions = self.recipe.sample.num_completions
        if self.recipe.data.rewards is not None:
            return self._given(self.recipe.data.rewards, "data.rewards", completions)
        return self.sampled(completions)

    def sampled(self, completions: int) -> Load:
        """Samples for the prompts of the recipe."""
        data = self.recipe.data
        source, name = (data.prompts, "data.prompts") if data.prompts else (data.preferences, "data.preferences")
        return self._drawn(source, self._rows(source, name), completions)

    def evaluation(self) -> Load:
        """M samples for each evaluation prompt."""
        settings, source = self.recipe.evaluate, self.recipe.data.evaluation
        return self._drawn(source, min(settings.prompts, self._rows(source, "data.evaluation")), settings.samples)

    def pool(self) -> Load:
        settings, evaluated = self.recipe.evaluate, self.evaluation()
        return replace(
            evaluated, prompts=min(settings.pool_prompts, evaluated.prompts), completions=settings.pool_samples
        )

    def _given(self, source: DataSettings | None, name: str, completions: int) -> Load:
        longest = self.recipe.data.max_completion_tokens
        return self._load(source, self._rows(source, name), completions, longest)

    def _drawn(self, source: DataSettings | None, rows: int, completions: int) -> Load:
        return self._load(source, rows, completions, self.recipe.sample.max_new_tokens)

    def _load(self, source: DataSettings | None, rows: int, completions: int, longest: int) -> Load:
        longest_prompt = self.recipe.data.max_prompt_tokens
        exact = None if source is None else source.prompt_tokens
        given = self.assumed.prompt_tokens
        if given is not None and given > longest_prompt:
            raise InputError(f"--prompt-tokens {given} is above data.max_prompt_tokens = {longest_prompt}; lower it.")
        prompt = given or min(exact or max(1, longest_prompt // 2), longest_prompt)
        return Load(rows, completions, prompt, self._completion(longest), longest_prompt, longest)

    def _completion(self, longest: int) -> int:
        return min(self.assumed.completion_tokens or max(1, longest // 2), longest)

    def _rows(self, source: DataSettings | None, name: str) -> int:
        assert source is not None  # the recipe's own check
        if self.assumed.prompts is not None and name != "data.evaluation":
            self.said[f"{name}: {self.assumed.prompts:,} rows (--prompts)"] = None
            return self.assumed.prompts
        rows, how = self._known.get(name) or rows_of(source)
        self._known[name] = rows, how
        self.said[f"{name}: {rows:,} rows ({how})"] = None
        return rows


def rows_of(source: DataSettings) -> tuple[int, str]:
    """How many rows a source has after `skip` and `limit`, and how that is known. Local data is read to its end."""
    if Path(source.source).expanduser().exists():
        counted = sum(1 for _ in read_source(source.model_copy(update={"prompt_tokens": None}), Counter()))
        return counted, f"counted in {source.source}"
    for (name, split), rows in PUBLISHED_ROWS.items():
        if (source.source == name and (source.split or "train") == split) or source.source.endswith("/" + name):
            return _after_limits(rows, source), f"published size of {source.source}"
    if source.limit is not None:
        return source.limit, f"limit; {source.source} is not here to be counted"
    return UNKNOWN_ROWS, f"assumed, {source.source} is not here to be counted: give --prompts"


def _after_limits(rows: int, source: DataSettings) -> int:
    left = max(0, rows - source.skip)
    return left if source.limit is None else min(left, source.limit)
