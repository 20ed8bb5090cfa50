"""The report: one HTML file that needs nothing else, and the figures beside it as PNG and SVG."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Evidence, MethodEvidence
from exalign.report.captions import Captions
from exalign.report.figure_density import draw_density
from exalign.report.figure_frontier import draw_accuracy_frontier, draw_frontier
from exalign.report.figure_training import draw_alignment, draw_checkpoints, draw_other_stages
from exalign.report.headline import headline
from exalign.report.style import DARK, LIGHT, figure_style, looks_of
from exalign.report.svg import inline_svg, save_figure
from exalign.report.verdict_bar import verdict_bar
from exalign.report.win_table import win_table
from exalign.report.wording import duration, interval, number, percent, setting, visible, words
from exalign.storage import write_text

WIDE, NARROW = 8.8, 3.75
"""Widths of figures in inches: for a screen and paper, and for a phone, where text would else be too small."""


def write_report(run: Path) -> Path:
    """Read `evaluation/evidence.json` of the run in folder `run`; write its report and return the path of the page.

    A missing or damaged evidence file is an `InputError`.
    """
    folder = RunFolder(Path(run))
    evidence = folder.read_evidence()
    figures = dict(_figures(evidence, folder.figures))
    write_text(folder.page, render_page(evidence, figures))
    return folder.page


def render_page(evidence: Evidence, figures: dict[str, Markup]) -> str:
    """The page as text. Everything that is not markup of this package is escaped, and control characters shown."""
    environment = Environment(
        loader=PackageLoader("exalign.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Every printed value passes here before it is escaped, so no text can be forgotten.
        finalize=_finalize,
    )
    for function in (number, interval, percent, duration, words, setting):
        environment.filters[function.__name__] = function
    environment.filters["plain"] = _plain
    names = [method.name for method in evidence.methods]
    environment.filters["names"] = lambda text: _mark_names(text, names)
    looks = looks_of(evidence.methods)
    return environment.get_template("page.html.jinja").render(
        evidence=evidence,
        headline=headline(evidence),
        figures=figures,
        looks=looks,
        describe=describe,
        wins=win_table(evidence),
        captions=Captions(evidence),
        verdict_bar=lambda tally: verdict_bar(tally, looks),
        light=LIGHT,
        dark=DARK,
        total_seconds=sum(stage.seconds or 0 for stage in evidence.stages),
        longest_stage=max((stage.seconds or 0 for stage in evidence.stages), default=0) or 1,
    )


def describe(method: MethodEvidence) -> str:
    """A method in words: what it minimises, on what, with which β."""
    family = {"exo": "EXO", "dpo": "DPO", "ppo": "PPO"}.get(method.family, str(method.settings.get("divergence", "")))
    target = {"reward": "reward target", "preference": "preference target"}.get(method.target or "", "")
    names = {"beta_pi": "β_π", "beta_r": "β_r", "beta": "β", "epsilon": "ε"}
    unused = "epsilon" if method.target == "reward" else "beta_r"
    values = [
        f"{sign} {method.settings[key]:g}"
        for key, sign in names.items()
        if key != unused and isinstance(method.settings.get(key), int | float)
    ]
    return ", ".join(part for part in (words(family), target, *values) if part)


def _figures(evidence: Evidence, folder: Path) -> Iterator[tuple[str, Markup]]:
    """Draw each figure wide and narrow; save the wide one; yield both as markup under the figure's name."""
    looks, density = looks_of(evidence.methods), evidence.density
    drawings: dict[str, tuple[str, Callable[[float], Figure | None]]] = {
        "frontier": (
            "Mean reward against KL to the supervised policy, for every method's checkpoints",
            lambda width: draw_frontier(evidence, looks, width=width),
        ),
        "accuracy": (
            "Share of samples that the classifier calls positive against KL to the supervised policy",
            lambda width: draw_accuracy_frontier(evidence, looks, width=width),
        ),
        "density": (
            "Density ratio of each policy to the supervised one along the samples' log-probability",
            lambda width: None if density is None else draw_density(density, looks, width=width),
        ),
        "checkpoints": (
            "Reward, KL and further measures of each checkpoint against training step",
            lambda width: draw_checkpoints(evidence, looks, width=width),
        ),
        "alignment": (
            "Training metrics of each method against step",
            lambda width: draw_alignment(evidence, looks, width=width),
        ),
        "stages": ("Loss of the other stages against step", lambda width: draw_other_stages(evidence, width=width)),
    }
    for name, (description, draw) in drawings.items():
        with figure_style():
            wide, narrow = draw(WIDE), draw(NARROW)
            if wide is None or narrow is None:
                continue
            for figure in (wide, narrow):
                # The layout is solved once, not again for every format.
                figure.draw_without_rendering()
                figure.set_layout_engine("none")
        save_figure(wide, folder, name)
        both = (
            f'<div class="wide">{inline_svg(wide, name, description)}</div>'
            f'<div class="narrow">{inline_svg(narrow, name + "-narrow", description)}</div>'
        )
        yield name, Markup(both)


def _finalize(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    return visible(value) if isinstance(value, str) else value


def _plain(value: Any) -> str:
    """A value of the environment as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _mark_names(text: str, names: list[str]) -> Markup:
    """Escaped text in which the methods' names stand out and are not broken at their hyphens."""
    text = str(escape(visible(text)))
    if names:
        longest_first = sorted((str(escape(visible(name))) for name in names), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        text = re.sub(rf"(?<![\w-])({pattern})(?![\w-])", r'<span class="method">\1</span>', text)
    return Markup(text)
