"""How things look: one appearance per method, on the page and in every figure, light and dark, in colour and in grey.

Figures are drawn with the light colours below; `svg.inline_svg` turns each into the page's custom property of the same
name, so that a figure follows the reader's light or dark preference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib

from exalign.evaluation.schema import MethodEvidence

LIGHT = {
    "ink": "#1c2127",
    "muted": "#68707c",
    "rule": "#dcdfe4",
    "paper": "#fefefe",
    "exo-1": "#0b5fa5",
    "exo-2": "#2a76b9",
    "exo-3": "#073b6a",
    "dpo-1": "#d97706",
    "dpo-2": "#e8952f",
    "dpo-3": "#a85a03",
    "ppo-1": "#b3324a",
    "ppo-2": "#cf5f72",
    "ppo-3": "#7d1f31",
    "other-1": "#0f8a6d",
    "other-2": "#a8498f",
    "other-3": "#7d7a24",
}
DARK = {
    "ink": "#e7eaee",
    "muted": "#9aa3af",
    "rule": "#343a43",
    "paper": "#14171b",
    "exo-1": "#62b0f2",
    "exo-2": "#8cc6f7",
    "exo-3": "#3d8fd6",
    "dpo-1": "#f2a33a",
    "dpo-2": "#f7c078",
    "dpo-3": "#cf8420",
    "ppo-1": "#f08295",
    "ppo-2": "#f5a9b5",
    "ppo-3": "#d05a70",
    "other-1": "#45c7a6",
    "other-2": "#dc93ca",
    "other-3": "#bdba5c",
}
_MARKERS = {"exo": "ooH", "dpo": "ssX", "ppo": "DdD", "other": "^vP"}
_PER_FAMILY = 3

_FIGURE_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.hashsalt": "exalign",
}


def figure_style(**more: str) -> AbstractContextManager[None]:
    """The context in which every figure is made and saved; `more` are further matplotlib settings, `_` for `.`."""
    settings: Any = {**_FIGURE_STYLE, **{name.replace("_", "."): value for name, value in more.items()}}
    return matplotlib.rc_context(settings)


@dataclass(frozen=True)
class Look:
    """How a method is drawn. `name` is the custom property of its colour. EXO is dark and round, DPO light and square,
    PPO red with diamonds, others have triangles; a reward target is solid and filled, a preference target dashed and
    hollow."""

    name: str
    color: str
    marker: str
    dashes: str
    hollow: bool

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of matplotlib's `plot`."""
        return {
            "color": self.color,
            "linestyle": self.dashes,
            "marker": self.marker,
            "markerfacecolor": LIGHT["paper"] if self.hollow else self.color,
            "markeredgecolor": self.color,
            "markeredgewidth": 1.4,
        }


def looks_of(methods: Iterable[MethodEvidence]) -> dict[str, Look]:
    """One look per method, by its family and target; later methods of a family get its further shades."""
    taken: Counter[str] = Counter()
    looks = {}
    for method in methods:
        family = method.family if method.family in _MARKERS else "other"
        place = taken[family] % _PER_FAMILY
        taken[family] += 1
        name = f"{family}-{place + 1}"
        hollow = method.target == "preference"
        looks[method.name] = Look(name, LIGHT[name], _MARKERS[family][place], "--" if hollow else "-", hollow)
    return looks
