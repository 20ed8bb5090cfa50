"""Direct labels: names beside the ends of lines, moved apart where they would overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import findfont, get_font

from exalign.report.style import LIGHT
from exalign.report.wording import visible


def spread_apart(wanted: Sequence[float], distance: float) -> list[float]:
    """Positions in the order of `wanted`, at least `distance` apart, each group of neighbours around its mean.

    >>> spread_apart([0.0, 0.1, 5.0], 1.0)
    [-0.45, 0.55, 5.0]
    """
    order = np.argsort(wanted, kind="stable")
    groups: list[list[int]] = []
    centers: list[float] = []
    for i in order:
        groups.append([int(i)])
        centers.append(float(wanted[i]))
        while len(groups) > 1 and centers[-1] - centers[-2] < distance * (len(groups[-1]) + len(groups[-2])) / 2:
            last = groups.pop()
            centers.pop()
            groups[-1] += last
            centers[-1] = float(np.mean([wanted[j] for j in groups[-1]]))
    places = [0.0] * len(wanted)
    for group, center in zip(groups, centers, strict=True):
        for rank, i in enumerate(group):
            places[i] = center + distance * (rank - (len(group) - 1) / 2)
    return places


def label_right(axes: Axes, ends: Sequence[tuple[str, str, float, float]], *, distance: float = 0.052) -> None:
    """Write each name right of the axes at the height of its end (name, color, x, y), with a thin line to it."""
    if not ends:
        return
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    heights = [(y - y_low) / (y_high - y_low) for _, _, _, y in ends]
    for (name, color, x, _), height, place in zip(ends, heights, spread_apart(heights, distance), strict=True):
        start = (x - x_low) / (x_high - x_low)
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
