"""Figures as files, and as SVG inside the page: no outside reference, no clash of ids, the page's colours."""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from exalign.report.style import LIGHT, figure_style
from exalign.report.wording import visible
from exalign.storage import atomic_path

_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
PNG_DPI = 160
WIDTH = 8.8
"""Inches of a figure with its caption."""
_CAPTION_LETTERS = 165
"""Letters in a line of the caption, which `WIDTH` has room for."""


def write_under(figure: Figure, caption: str) -> None:
    """Write a caption under a figure of `WIDTH`, which grows by its lines."""
    text = "\n".join(textwrap.wrap(visible(caption), _CAPTION_LETTERS))
    figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 0.13 * (text.count("\n") + 2))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color=LIGHT["muted"])


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write `name`.png and `name`.svg, text as outlines so that they look alike everywhere."""
    for kind, metadata in (("png", {"Software": None}), ("svg", _NO_METADATA)):
        with figure_style(svg_fonttype="path"), atomic_path(folder / f"{name}.{kind}") as at:
            figure.savefig(at, format=kind, dpi=PNG_DPI, metadata=metadata, facecolor="white")


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element for the page; `name` makes its ids unique, `description` is read aloud."""
    stream = io.StringIO()
    with figure_style(svg_fonttype="none"):
        figure.savefig(stream, format="svg", metadata=_NO_METADATA, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\b(id=\"|xlink:href=\"#|url\(#)", rf"\g<1>{name}-", text)
    # A width in points would not shrink with the page; the viewBox keeps the proportions.
    text = re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" {_NAMESPACES}>', text, count=1)
    for key, color in LIGHT.items():
        text = re.sub(re.escape(color) + r"\b", f"var(--{key})", text, flags=re.IGNORECASE)
    # A hundredth of a point is finer than any screen; six digits would double the size of the page.
    text = re.sub(r'\bd="[^"]*"', lambda path: _LONG.sub(lambda x: f"{float(x[0]):.2f}", path[0]), text)
    head, rest = text.split(">", 1)
    return f"{head}><title>{_escape(description)}</title>{rest}"


_LONG = re.compile(r"-?\d+\.\d{3,}")
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
