"""Any Python function as a reward."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from exalign.data.record import Prompt, Record
from exalign.errors import InputError
from exalign.rollout.scorer import check_rewards

RewardFunction = Callable[[list[Prompt], list[list[str]]], Sequence[Sequence[float]]]


class FunctionScorer:
    """Rewards from `function(prompts, completions)`, named as `module:function`.

    `prompts` is a list of B prompts, `completions` a list of B lists of texts; the function returns B lists of as many
    numbers. The module is looked for in the working directory too. A name that cannot be imported, a wrong number of
    rewards, and one that is not finite are `InputError`s; what the function itself raises is passed on unchanged.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._function = _load(name)

    def score(self, records: Sequence[Record]) -> list[list[float]]:
        """One list of K rewards per record."""
        prompts = [record.prompt for record in records]
        texts = [[completion.text for completion in record.completions] for record in records]
        rewards: Any = self._function(prompts, texts)
        try:
            listed = [list(values) for values in rewards]
        except TypeError:
            raise InputError(f"{self._name} must return one list of rewards per prompt, not {rewards!r:.60}.") from None
        return check_rewards(listed, records, source=self._name)


def _load(name: str) -> RewardFunction:
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise InputError(f"A reward function is named as module:function, not {name!r}.")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"The reward function {name} cannot be imported from {here}: {error}.") from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"The module {module_name} has no function {function_name}.")
    return function
