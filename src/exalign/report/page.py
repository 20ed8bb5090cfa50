"""The report: one HTML file that needs nothing else, and the figures beside it as PNG and SVG, their data as CSV."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from exalign.evaluation.across_runs import contrasts
from exalign.evaluation.pool import OPTIMUM, PROXY_OPTIMUM
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import EqualKL, Evidence, FrontierPoint, Interval, MethodEvidence, Verdict
from exalign.report.figures import (
    CLASSIFIER,
    MARGIN,
    PAIRS,
    draw_alignment,
    draw_checkpoints,
    draw_density,
    draw_frontier,
    draw_other_stages,
)
from exalign.report.style import DARK, LIGHT, WIDTH, figure_style, inline_svg, looks_of, save_figure
from exalign.report.verdicts import category_table, win_table
from exalign.report.wording import (
    Captions,
    css_share,
    csv_text,
    describe,
    duration,
    interval,
    number,
    percent,
    plus_minus,
    setting,
    visible,
    words,
)
from exalign.storage import write_text

NARROW = 3.75
"""Inches of a figure for a phone, where text would else be too small."""


def write_report(run: Path) -> Path:
    """Read `evaluation/evidence.json` of the run in folder `run`; write its report and return the path of the page.

    A missing or damaged evidence file is an `InputError`.
    """
    folder = RunFolder(Path(run))
    evidence = folder.read_evidence()
    figures = dict(_figures(evidence, folder.figures))
    _write_tables(evidence, folder.figures)
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
    for function in (number, interval, percent, css_share, plus_minus, duration, words, setting, describe):
        environment.filters[function.__name__] = function
    environment.filters["plain"] = _plain
    script = Markup(files("exalign.report").joinpath("search.js").read_text(encoding="utf-8"))
    names = [method.name for method in evidence.methods]
    environment.filters["names"] = lambda text: _mark_names(text, names)
    return environment.get_template("page.html.jinja").render(
        evidence=evidence,
        shipped=shipped(evidence),
        headline=headline(evidence),
        figures=figures,
        looks=looks_of(evidence.methods),
        wins=win_table(evidence),
        by_category=category_table(evidence),
        captions=Captions(evidence),
        light=LIGHT,
        dark=DARK,
        script=script,
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        total_seconds=sum(stage.seconds or 0 for stage in evidence.stages),
        longest_stage=max((stage.seconds or 0 for stage in evidence.stages), default=0) or 1,
    )


def _figures(evidence: Evidence, folder: Path) -> Iterator[tuple[str, Markup]]:
    """Draw each figure wide and narrow; save the wide one; yield both as markup under the figure's name."""
    looks = looks_of(evidence.methods)
    drawings: dict[str, tuple[str, Callable[..., Figure | None]]] = {
        "frontier": (
            f"{'Mean reward' if evidence.scored else 'Accuracy on held-out pairs'} against KL to the supervised policy",
            partial(draw_frontier, evidence, looks),
        ),
        "accuracy": (
            "Probability of the label, by the classifier, against KL to the supervised policy",
            partial(draw_frontier, evidence, looks, CLASSIFIER),
        ),
        "pairs": (
            "Accuracy on held-out preference pairs against KL to the supervised policy",
            partial(draw_frontier, evidence, looks, PAIRS),
        ),
        "margin": (
            "Margin of log-ratios on held-out preference pairs against KL to the supervised policy",
            partial(draw_frontier, evidence, looks, MARGIN),
        ),
        "density": (
            "Density ratio of each policy to the supervised one along the samples' log-probability",
            partial(draw_density, evidence.density, looks),
        ),
        "checkpoints": (
            "Reward, KL and further measures of each checkpoint against training step",
            partial(draw_checkpoints, evidence, looks),
        ),
        "alignment": ("Training metrics of each method against step", partial(draw_alignment, evidence, looks)),
        "stages": ("Loss of the other stages against step", partial(draw_other_stages, evidence)),
    }
    if not evidence.scored:
        del drawings["pairs"]  # the frontier shows them
    for name, (description, draw) in drawings.items():
        with figure_style():
            wide, narrow = draw(width=WIDTH), draw(width=NARROW)
        if wide is None or narrow is None:
            continue
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
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _mark_names(text: str, names: list[str]) -> Markup:
    """Escaped text in which the methods' names stand out and are not broken at their hyphens."""
    text = str(escape(visible(text)))
    if names := [name for name in names if len(name) > 1]:  # "a" is a word as well
        longest_first = sorted((str(escape(visible(name))) for name in names), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        text = re.sub(rf"(?<![\w/-])({pattern})(?![\w/-])", r'<span class="method">\1</span>', text)
    return Markup(text)


def _write_tables(evidence: Evidence, folder: Path) -> None:
    """What every mark of the figures stands on, with its interval."""
    for name, table in (
        ("checkpoints", _checkpoints),
        ("optimum", _optimum),
        ("training", _training),
        ("density", _density),
    ):
        rows = list(table(evidence))
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            write_text(folder / f"{name}.csv", csv_text([columns, *([row.get(c) for c in columns] for row in rows)]))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names; an estimate stands under its own name.

    >>> _flat({"kl": {"estimate": 1.0, "low": 0.5, "high": 1.5, "num_prompts": 8}, "step": 3})
    {'kl': 1.0, 'kl.low': 0.5, 'kl.high': 1.5, 'kl.num_prompts': 8, 'step': 3}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{prefix}{name}" if name != "estimate" or not prefix else prefix.removesuffix(".")
        flat |= _flat(value, f"{dotted}.") if isinstance(value, Mapping) else {dotted: value}
    return flat


def _checkpoints(evidence: Evidence) -> Iterator[dict[str, Any]]:
    if evidence.sft is not None:
        yield {"method": "SFT"} | _flat(asdict(evidence.sft))
    for method in evidence.methods:
        for point in method.points:
            beta = {} if method.sweep is None else {"beta": method.sweep.betas[point.step - 1]}
            yield {"method": method.name} | beta | _flat(asdict(point))


def _optimum(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for curve, optimum in ((OPTIMUM, evidence.optimum), (PROXY_OPTIMUM, evidence.proxy_optimum)):
        yield from ({"curve": curve} | _flat(asdict(point)) for point in (optimum.points if optimum else ()))
    for best in evidence.best_of_n:
        values = asdict(best)
        values.pop("win_rates")
        yield {"curve": "best of N"} | _flat(values)


def _training(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for curve in evidence.curves:
        for place, step in enumerate(curve.steps):
            yield {"stage": curve.stage, "step": step} | {name: found[place] for name, found in curve.values.items()}


def _density(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for prompt in evidence.density.prompts if evidence.density else ():
        for curve in prompt.curves:
            for place in zip(prompt.grid, curve.ratio, curve.low, curve.high, strict=True):
                names = ("log_sft", "ratio", "ratio.low", "ratio.high")
                yield {"prompt": prompt.id, "policy": curve.policy} | dict(zip(names, place, strict=True))


@dataclass(frozen=True)
class Headline:
    title: str
    sentences: list[str]


def shipped(evidence: Evidence) -> Headline | None:
    """Which checkpoint to use, what it gains over the supervised policy and what it costs; None without a verdict."""
    verdict, chosen = evidence.verdict, evidence.chosen()
    if verdict is None or chosen is None:
        known = [(p.nats, f"{m.name} at {m.at(p.step)}") for m in evidence.methods for p in m.points if p.kl]
        if evidence.kl_budget is None or not known or min(known)[0] <= evidence.kl_budget:
            return None
        nats, nearest = min(known)
        title = f"No checkpoint is within {evidence.kl_budget:g} nats of the supervised policy."
        return Headline(title, [f"The nearest is {nearest}, {number(nats, 2)} nats away."])
    method, point = chosen
    gain, at = point.gain, "at an unknown KL" if point.kl is None else f"at a KL of {number(point.nats, 2)} nats"
    if not verdict.certain:
        of = "" if verdict.within is None else f" within {verdict.within:g} nats"
        of += " whose KL is not wasted" if verdict.passed_over else ""
        title = f"No checkpoint{of} is measurably better than the supervised policy."
    elif gain is not None:
        title = f"Ship {method.name} at {method.at(point.step)}: {number(gain.estimate, 2)} more reward, {at}."
    else:
        assert point.held_out is not None
        right = f"{100 * point.held_out.accuracy.estimate:.0f}\N{NO-BREAK SPACE}% of held-out pairs right"
        title = f"Ship {method.name} at {method.at(point.step)}: {right}, {at}."
    what = f"{method.name}: {method.line}. " if method.line else ""
    where = "It is" if verdict.certain else f"The best guess, {method.name} at {method.at(point.step)}, is"
    place = f"{verdict.folder} of the run" if verdict.folder.startswith("align/") else verdict.folder
    sentences = [f"{what}{where} in {place}. {_gained(evidence, point)}", _cost(evidence, point)]
    return Headline(title, [*sentences, _rule(evidence, verdict)])


def _gained(evidence: Evidence, point: FrontierPoint) -> str:
    if point.reward is not None and evidence.sft is not None:
        return (
            f"Its mean reward is {interval(point.reward)} on {_prompts(evidence)}, "
            f"{interval(point.gain)} above the supervised policy's {interval(evidence.sft.reward)}."
        )
    assert point.held_out is not None
    accuracy = point.held_out.accuracy
    return (
        f"On {percent(accuracy)} of the held-out pairs, of {accuracy.num_prompts:,} prompts (by chance 50 %), "
        "it favours the preferred answer over the other one more than the supervised policy does, by a mean of "
        f"{interval(point.held_out.margin)} nats."
    )


def _cost(evidence: Evidence, point: FrontierPoint) -> str:
    sft = evidence.sft
    parts = ["Its KL is not known" if point.kl is None else f"It costs a KL of {interval(point.kl)} nats"]
    if sft is not None and sft.tokens is not None and point.tokens is not None:
        parts.append(f"answers are {number(point.tokens)} tokens long on average ({number(sft.tokens)} before)")
    if sft is not None and sft.finished is not None and point.finished is not None:
        parts.append(f"{100 * point.finished:.0f} % of them end by themselves ({100 * sft.finished:.0f} % before)")
    return "; ".join(parts) + "."


def _rule(evidence: Evidence, verdict: Verdict) -> str:
    count, within = verdict.among + verdict.passed_over, verdict.within
    of = f"Of {count} checkpoint{'s' * (count != 1)}" + (f" within {within:g} nats" if within is not None else "")
    if verdict.passed_over:
        of += f", less {verdict.passed_over} that the best of a few samples beats at a quarter of their KL or less,"
    rule = f"{of} it has the {'gain' if evidence.scored else 'accuracy'} whose interval has the highest lower end"
    if within is None:
        rule += ", however far it went: the recipe sets no evaluate.kl_budget"
    elif evidence.scored:
        rule = f"{of} it has the most reward{' of those that surely gained' if verdict.certain else ''}"
    widened = f" (with intervals widened for choosing among {verdict.among})" if verdict.among > 1 else ""
    return f"{rule}{widened}. It was chosen on the data that measured it, so it looks a little better than it is."


def headline(evidence: Evidence) -> Headline:
    """How the methods compare. A method is called ahead only where the interval of its lead excludes 0."""
    evaluated = [method for method in evidence.methods if method.points]
    stopped = [method.name for method in evidence.methods if not method.finished]
    unfinished = [f"Stopped before the end of training: {_list(stopped)}."] if stopped else []
    sentences = _opening(evidence)
    if not evaluated:
        return Headline("No aligned policy has been evaluated yet.", sentences)
    if not evidence.scored:
        return _on_pairs(evaluated, unfinished)
    if len(evaluated) == 1 or evidence.equal_kl is None:
        several = len(evaluated) > 1
        title = "The methods could not be compared at equal KL." if several else _gain_title(evaluated[0])
        sentences += [
            f"{method.name} ends at mean reward {interval(_end(method))}, {interval(method.gain)} above the supervised "
            f"policy's, {_at(method.points[-1])}."
            for method in evaluated
        ]
    else:
        best = max(evaluated, key=lambda method: _end(method).estimate)
        title = _ranking_title(evidence.equal_kl, best, evaluated)
        told = f"At the end of training {best.name} has the most reward, {interval(_end(best))} {_at(best.points[-1])}."
        sentences += [_ranking_sentence(evidence.equal_kl), told, *_exo_against_others(evidence)]
    first = evidence.equal_kl.standings[0].method if evidence.equal_kl else None
    leading = next((method for method in evaluated if method.name == first or len(evaluated) == 1), None)
    if leading is not None and (gap := leading.gap) is not None:
        above = f"{'≈ ' * gap.below_first_checkpoint}{interval(gap.gap)} above {leading.name}"
        sentences += [f"The best possible policy at KL {number(gap.kl)} is estimated {above}."]
    return Headline(title, sentences + unfinished)


def is_above_zero(value: Interval | None) -> bool:
    return value is not None and value.low is not None and value.low > 0


def _on_pairs(evaluated: list[MethodEvidence], unfinished: list[str]) -> Headline:
    """Methods at their ends by what they make of held-out pairs, where there are no rewards."""
    ends = [(method, method.points[-1]) for method in evaluated]
    sentences = [
        f"{method.name} ends at accuracy {percent(point.held_out.accuracy)} and margin "
        f"{interval(point.held_out.margin)} nats, {_at(point)}: the preferred texts' log-ratio is "
        f"{interval(point.held_out.preferred)}, the others' {interval(point.held_out.rejected)}."
        for method, point in ends
        if point.held_out is not None
    ]
    title = "Without a scorer: what held-out preferences say." if sentences else "No held-out pairs were read."
    return Headline(title, sentences + unfinished)


def _opening(evidence: Evidence) -> list[str]:
    if evidence.sft is None or evidence.sft.reward is None:
        return []
    model = f"The supervised policy ({evidence.policy})" if evidence.policy else "The supervised policy"
    return [f"{model} starts from a mean reward of {interval(evidence.sft.reward)} on {_prompts(evidence)}."]


def _prompts(evidence: Evidence) -> str:
    return f"{evidence.num_prompts:,} held-out prompt{'s' * (evidence.num_prompts != 1)}"


def _at(point: FrontierPoint) -> str:
    return "at an unknown KL" if point.kl is None else f"at KL {interval(point.kl)}"


def _gain_title(method: MethodEvidence) -> str:
    if is_above_zero(method.gain):
        return f"{method.name} raises the reward."
    if method.gain and method.gain.high is not None and method.gain.high < 0:
        return f"{method.name} lowers the reward."
    return f"{method.name} does not measurably change the reward."


def _ranking_title(equal: EqualKL, farthest: MethodEvidence, evaluated: list[MethodEvidence]) -> str:
    """`farthest` has the most reward at its end: said where the leader's interval lies below it."""
    best, *others = equal.standings
    if not others:
        why = "moved far enough to be judged" if len(evaluated) == 1 + len(equal.left_out) else "could be compared"
        return f"{best.method} is the only method that {why} at equal KL."
    level = [s.method for s in others if not is_above_zero(s.behind_leader)]
    if not level:
        low, high = _end(farthest).low, next(_end(m).high for m in evaluated if m.name == best.method)
        if farthest.name == best.method or low is None or high is None or low <= high:
            return f"{best.method} gets the most reward for its KL."
        return f"At KL {number(equal.kl, 2)} {best.method} leads; {farthest.name} goes further and gets more."
    if len(level) == len(others) and len(others) > 1:
        return "At equal KL, no method is clearly ahead."
    if behind := [s.method for s in others if s.method not in level]:  # the leader, which alone was held against each
        return f"At equal KL, {best.method} is level with {_list(level)}, and ahead of {_list(behind)}."
    return f"At equal KL, {_list([best.method, *level])} are level."


def _end(method: MethodEvidence) -> Interval:
    reward = method.points[-1].reward
    assert reward is not None
    return reward


def _ranking_sentence(equal: EqualKL) -> str:
    best, *others = equal.standings
    text = (
        f"At {number(equal.kl)} nats from the supervised policy, which all compared methods reach, {best.method} has "
        f"mean reward {interval(best.reward)}"
    )
    if others:
        second = others[0]
        text += f", {interval(second.behind_leader)} more than {second.method}, the next"
        if not is_above_zero(second.behind_leader):
            why = "one prompt gives no interval" if best.reward.low is None else "that interval includes 0"
            text += f"; {why}, so the order may be chance"
    if equal.left_out:
        text += f". Not compared, since at their best too close to the supervised policy: {_list(equal.left_out)}"
    return text + "."


def _exo_against_others(evidence: Evidence) -> list[str]:
    """One sentence for each of the `contrasts` that were compared."""
    by_name, wanted = {method.name: method for method in evidence.methods}, contrasts(evidence.methods)
    sentences = []
    for pair in evidence.comparisons:
        if (pair.first, pair.second) in wanted or (pair.second, pair.first) in wanted:
            first, second = by_name[pair.first], by_name[pair.second]
            on = {"reward": "On rewards", "preference": "On preferences"}.get(first.target or "", "Against each other")
            one, other = (f"{method.called} ({method.name})" for method in (first, second))
            amount, at = interval(pair.difference), f"at KL {number(pair.kl)}"
            if is_above_zero(pair.difference):
                sentences.append(f"{on}, {one} is ahead of {other}: {amount} more reward {at}.")
            else:
                sentences.append(f"{on}, {one} and {other} are level: a difference of {amount} {at}.")
    return sentences


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
