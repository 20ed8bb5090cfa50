"""The strict base of every settings class: frozen, no unknown keys, no silent conversion of a wrong type.

Each stage defines its settings beside the code that reads them; `run/recipe.py` assembles them
into the recipe. Every field carries a default (unless it must be given) and a one-line description.
"""

import os.path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Source = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path or a hub's name in a setting. A `~` in front is the user's home: expanded here, and nowhere else."""
