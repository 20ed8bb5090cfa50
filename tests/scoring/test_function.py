"""A reward function is named, found from the working directory, and checked."""

from __future__ import annotations

import sys

import pytest

from exalign.errors import InputError
from exalign.rollout.function_scorer import FunctionScorer

MODULE = """
def length(prompts, completions):
    return [[len(text) + 100 * len(prompt) for text in texts] for prompt, texts in zip(prompts, completions)]

def too_few(prompts, completions):
    return [[0.0] for _ in completions]

def too_few_prompts(prompts, completions):
    return [[0.0, 0.0]]

def not_finite(prompts, completions):
    return [[float("inf") if len(text) > 15 else 0.0 for text in texts] for texts in completions]

def words(prompts, completions):
    return [["good" for _ in texts] for texts in completions]

def nothing(prompts, completions):
    return None

def fails(prompts, completions):
    raise KeyError("the author's own mistake")

constant = 3
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "my_broken_rewards.py").write_text("import a_module_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_rewards", "my_broken_rewards"):
        sys.modules.pop(name, None)


def test_rewards_come_from_the_function(records):
    path = list(sys.path)
    rewards = FunctionScorer("my_rewards:length").score(records)
    assert rewards == [[len(c.text) + 100 * len(r.prompt) for c in r.completions] for r in records]
    assert all(isinstance(value, float) for row in rewards for value in row)
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards", "module:function"),
        (":length", "module:function"),
        ("my_rewards:", "module:function"),
        ("no_such_module:length", "no_such_module"),
        ("my_broken_rewards:length", "a_module_that_is_not_there"),
        ("my_rewards:absent", "no function absent"),
        ("my_rewards:constant", "no function constant"),
    ],
)
def test_a_function_that_cannot_be_had(name, message):
    with pytest.raises(InputError, match=message):
        FunctionScorer(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "1 rewards to record a, which has 2"),
        ("too_few_prompts", "1 prompts, but there are 3"),
        ("not_finite", "the reward inf to completion 0 of record b"),
        ("words", "the reward good to completion 0 of record a"),
        ("nothing", "one list of rewards per prompt"),
    ],
)
def test_rewards_that_cannot_be_used(records, name, message):
    with pytest.raises(InputError, match=message):
        FunctionScorer(f"my_rewards:{name}").score(records)


def test_what_the_function_raises_is_passed_on(records):
    with pytest.raises(KeyError, match="own mistake"):
        FunctionScorer("my_rewards:fails").score(records)
