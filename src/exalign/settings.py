"""The strict base of every settings class: frozen, no unknown keys, no silent conversion of a wrong type.

Each stage defines its settings beside the code that reads them; `run/recipe.py` assembles them
into the recipe. Every field carries a default (unless it must be given) and a one-line description.
"""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
