"""How things look: one appearance per method, on the page and in every figure, light and dark, in colour and in grey.

Figures are drawn with the light colours below; `inline_svg` turns each into the page's custom property of the same
name, so that a figure follows the reader's light or dark preference. They are written as files, and as SVG inside the
page: no outside reference, no clash of ids.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from exalign.evaluation.schema import Interval, MethodEvidence
from exalign.report.wording import visible
from exalign.storage import atomic_path

_COLORS = {
    "ink": ("#1c2127", "#e7eaee"),
    "muted": ("#68707c", "#9aa3af"),
    "rule": ("#dcdfe4", "#343a43"),
    "paper": ("#fefefe", "#14171b"),
    "exo-1": ("#0b5fa5", "#62b0f2"),
    "exo-2": ("#2a76b9", "#8cc6f7"),
    "exo-3": ("#073b6a", "#3d8fd6"),
    "dpo-1": ("#d97706", "#f2a33a"),
    "dpo-2": ("#e8952f", "#f7c078"),
    "dpo-3": ("#a85a03", "#cf8420"),
    "ppo-1": ("#b3324a", "#f08295"),
    "ppo-2": ("#cf5f72", "#f5a9b5"),
    "ppo-3": ("#7d1f31", "#d05a70"),
    "other-1": ("#0f8a6d", "#45c7a6"),
    "other-2": ("#a8498f", "#dc93ca"),
    "other-3": ("#7d7a24", "#bdba5c"),
}
"""Of the page in light and in dark."""
LIGHT, DARK = ({name: colors[i] for name, colors in _COLORS.items()} for i in (0, 1))
_MARKERS = {"exo": "op8", "dpo": "sXP", "ppo": "DdH", "other": "^v*"}

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


def figure_style(svg_text: str = "path") -> AbstractContextManager[None]:
    """The context in which every figure is made and saved, the letters of an SVG as outlines or as text (`none`)."""
    settings: Any = {**_FIGURE_STYLE, "svg.fonttype": svg_text}
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
        return {
            "color": self.color,
            "linestyle": self.dashes,
            "marker": self.marker,
            "markerfacecolor": LIGHT["paper"] if self.hollow else self.color,
            "markeredgecolor": self.color,
            "markeredgewidth": 1.4,
        }


def looks_of(methods: Iterable[MethodEvidence]) -> dict[str, Look]:
    """One look per method, by its family and target; the nine first of a family differ in shade or marker."""
    taken: Counter[str] = Counter()
    looks = {}
    for method in methods:
        family = method.family if method.family in _MARKERS else "other"
        turn, place = divmod(taken[family], 3)
        taken[family] += 1
        name = f"{family}-{place + 1}"
        marker, hollow = _MARKERS[family][(place + turn) % 3], method.target == "preference"
        looks[method.name] = Look(name, LIGHT[name], marker, "--" if hollow else "-", hollow)
    return looks


def spread_apart(wanted: Sequence[float], distance: float) -> list[float]:
    """Positions in the order of `wanted`, at least `distance` apart, each group of neighbours around its mean.

    >>> spread_apart([0.0, 0.1, 5.0], 1.0)
    [-0.45, 0.55, 5.0]
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    ranks = distance * np.arange(len(order))
    places = np.empty(len(order))
    places[order] = isotonic_regression(np.asarray(wanted)[order] - ranks).x + ranks
    return [float(place) for place in places]


def label_right(axes: Axes, ends: Sequence[tuple[str, str, float, float]], *, distance: float = 0.052) -> None:
    """Write each name right of the axes at the height of its end (name, color, x, y), with a thin line to it."""
    if not ends:
        return
    shares = axes.transLimits.transform(axes.transScale.transform([(x, y) for *_, x, y in ends]))
    starts, heights = shares.T  # of the axes' width and height
    for (name, color, *_), start, height, place in zip(
        ends, starts, heights, spread_apart(heights, distance), strict=True
    ):
        axes.plot(
            [start, 1.005, 1.025],
            [height, place, place],
            transform=axes.transAxes,
            color=color,
            linewidth=0.7,
            linestyle=(0, (1, 2)),
            clip_on=False,
            zorder=1.5,
        )
        axes.text(1.032, place, name, transform=axes.transAxes, va="center", color=LIGHT["ink"], fontsize=9)


def drawable(text: str) -> str:
    """The text with a box for every character that the figures' font has no glyph for.

    >>> drawable("été \\u6f22\\u5b57")
    'été □□'
    """
    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if c == " " or font.get_char_index(ord(c)) else "□" for c in visible(text))


_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
WIDTH = 8.8
"""Inches of a figure for a screen and paper."""
_CAPTION_LETTERS = 165
"""Letters in a line of the caption, which `WIDTH` has room for."""


def vertical_bar(axes: Axes, x: float, value: Interval, color: str, **look: Any) -> None:
    """The interval at `x`, where there is one."""
    if value.low is not None and value.high is not None:
        axes.vlines(x, value.low, value.high, color=color, **look)


def shared_legend(figure: Figure, columns: int, *, handlelength: float = 2.6) -> None:
    """One legend above all panels, each name once."""
    handles = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    named = [line for name, line in handles.items() if not name.startswith("_")]
    legend_within(figure, named, columns, handlelength=handlelength)


def legend_within(
    figure: Figure,
    handles: Sequence[Artist],
    columns: int,
    *,
    loc: Literal["outside upper left", "outside lower center"] = "outside upper left",
    handlelength: float = 2.6,
    columnspacing: float = 2.0,
) -> None:
    """A legend in so many columns, or in as many as the figure is wide enough for, which then is as much higher."""
    height = 0.0
    for count in range(columns, 0, -1):
        legend = figure.legend(
            handles=handles, ncols=count, loc=loc, handlelength=handlelength, columnspacing=columnspacing
        )
        extent = legend.get_window_extent()
        height = height or extent.height
        if count == 1 or extent.width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + (extent.height - height) / figure.dpi)
            return
        legend.remove()


def _settle(figure: Figure) -> None:
    """Solve the layout once, not again for every format. An engine that is left makes each format draw twice."""
    engine = figure.get_layout_engine()
    if engine is not None:
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if not axis.get_label_text()):
            axis.set_label_coords(0, 0)  # or the place of no label is sought among the ticks, again and again
        with figure_style():
            engine.execute(figure)
        figure.set_layout_engine(None)


def save_figure(figure: Figure, folder: Path, name: str, caption: str = "") -> Path:
    """Write `name`.png and `name`.svg, text as outlines so that they look alike everywhere; the PNG's path.

    A caption is written under a figure of `WIDTH`, which grows by its lines.
    """
    if caption:
        text = "\n".join(textwrap.wrap(visible(caption), _CAPTION_LETTERS))
        figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 0.13 * (text.count("\n") + 2))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color=LIGHT["muted"])
    _settle(figure)
    for kind, metadata in (("png", {"Software": None}), ("svg", _NO_METADATA)):
        with figure_style(), atomic_path(folder / f"{name}.{kind}") as at:
            figure.savefig(at, format=kind, dpi=160, metadata=metadata, facecolor="white")
    return folder / f"{name}.png"


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element for the page; `name` makes its ids unique, `description` is read aloud."""
    _settle(figure)
    stream = io.StringIO()
    with figure_style("none"):
        figure.savefig(stream, format="svg", metadata=_NO_METADATA, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # A width in points would not shrink with the page; the viewBox keeps the proportions.
    text = re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" {_NAMESPACES}>', text, count=1)
    text = re.sub(r"<[^>]*>", lambda tag: _of_page(tag[0], name), text)  # what stands between tags is somebody's words
    head, rest = text.split(">", 1)
    return f"{head}><title>{escape(description, quote=False)}</title>{rest}"


def _of_page(tag: str, name: str) -> str:
    tag = re.sub(r"\b(id=\"|xlink:href=\"#|url\(#)", rf"\g<1>{name}-", tag)
    for key, color in LIGHT.items():
        tag = re.sub(re.escape(color) + r"\b", f"var(--{key})", tag, flags=re.IGNORECASE)
    # A hundredth of a point is finer than any screen; six digits would double the size of the page.
    return re.sub(r'\bd="[^"]*"', lambda path: _LONG.sub(lambda x: f"{float(x[0]):.2f}", path[0]), tag)


_LONG = re.compile(r"-?\d+\.\d{3,}")
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
