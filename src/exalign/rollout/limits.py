"""How much of a text a scoring model was trained on, kept in its `config.json`.

A reward model that was trained on prompts cut to 256 tokens says something else of one with 300: further positions are
as it was initialised there. So what scores with it, in whatever run, has to cut as its training did.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from exalign.data.tokenization import TokenLimits
from exalign.errors import InputError

_NAME = "exalign_limits"


def keep_limits(model: Any, limits: TokenLimits) -> None:
    """Have the model carry the limits that it is about to be trained with, wherever it is saved."""
    setattr(model.config, _NAME, limits.model_dump())


def kept_limits(model: Any) -> TokenLimits | None:
    """The limits that a model was trained with; None where it does not say, as one that was made elsewhere."""
    values = getattr(model.config, _NAME, None)
    if values is None:
        return None
    try:
        return TokenLimits.model_validate(values)
    except ValidationError:
        name = getattr(model.config, "name_or_path", "") or "the model"
        raise InputError(f"config.json of {name} has {_NAME} that are no limits: {str(values)[:100]}") from None
