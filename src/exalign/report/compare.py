"""Several runs side by side: tables of reward at equal KL and of the ends, a figure; and what `select` selected."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from exalign.evaluation.across_runs import (
    AcrossRuns,
    RunResults,
    difference_at,
    differing_sections,
    differing_settings,
    over_runs,
)
from exalign.evaluation.pool import OPTIMUM, PROXY_OPTIMUM
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Curve, Interval, MethodEvidence
from exalign.evaluation.verdict import Selected
from exalign.report.style import LIGHT, WIDTH, drawable, figure_style, save_figure, shared_legend
from exalign.report.wording import best, duration, interval, markdown, number, percent
from exalign.terminal import shown


def tables(runs: Sequence[RunResults], kls: Sequence[float]) -> str:
    """The page: every run of every method is in it, and every mean says how many runs it is of."""
    if not any(run.evidence.scored for run in runs):
        return "\n\n".join(filter(None, (*_on_pairs(runs), _mixed(runs)))) + "\n"
    methods = list(dict.fromkeys(method for run in runs for method in run.rewards))
    several, differences, shares = len(runs) > 1, _differences(runs, kls), any(run.shares for run in runs)
    paired = " within a run; the mean over runs with Student's interval" if several else ""
    parts = [
        "## Reward at equal KL",
        "The best of a column in bold, which may be chance. With 95 % intervals over prompts"
        + ("; the mean over runs with Student's. " if several else ". ")
        + "“–”: the method has no more reward for going this far; of an optimum, too few samples show it.",
        _at_equal_kl(runs, methods, kls, "rewards"),
        _without_kl(runs),
        _mixed(runs),
        *(("## Differences at equal KL", f"{_CONTRASTS}{paired}.") if differences else ()),
        differences,
        *(("## Share of the optimum's gain", _SHARES + _PROXY * (PROXY_OPTIMUM in methods)) if shares else ()),
        _at_equal_kl(runs, [method for method in methods if method != OPTIMUM], kls, "shares"),
        *_sweeps(runs),
        *(() if all(run.evidence.scored for run in runs) else _on_pairs(runs)),
        "## Last checkpoints",
        f"{'' if any(m.sweep for run in runs for m in run.evidence.methods) else _OBJECTIVE + ' '}The gap is the "
        "estimated optimum's reward less the method's, at the KL given with it. Training is the time of the optimizer "
        "steps, with the sampling of methods that sample while they train, whose share is named.",
        _ends(runs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def across(value: AcrossRuns | None) -> str:
    """A mean over runs as text.

    >>> across(AcrossRuns(1.234, 1.1, 1.4, 3)), across(AcrossRuns(1.0, None, None, 1)), across(None)
    ('1.23 [1.10,\xa01.40], n = 3', '1.00, n = 1', '–')
    """
    if value is None:
        return "–"
    return f"{interval(Interval(value.mean, value.low, value.high, value.runs))}, n = {value.runs}"


_CONTRASTS = "EXO less DPO on the same target, and less PPO, paired by prompt"
_OBJECTIVE = (
    "The share of its objective: what a policy gained in reward − β·KL over the supervised one, of what the optimum at "
    "its own β gains."
)
_SHARES = "What a method gains over the supervised policy, as a share of what the estimated optimum gains at that KL."
_PROXY = (
    f" The {PROXY_OPTIMUM} is the best policy for the reward that methods were trained on, as the evaluation's scorer "
    "rewards it: how far that reward leads at best."
)


def _at_equal_kl(
    runs: Sequence[RunResults], methods: Sequence[str], kls: Sequence[float], what: Literal["rewards", "shares"]
) -> str:
    rows = []
    for kl in kls if any(getattr(run, what) for run in runs) else ():
        found = {method: [getattr(run, what).get(method, {}).get(kl) for run in runs] for method in methods}
        means = [over_runs([value.estimate for value in values if value is not None]) for values in found.values()]
        most = max((mean.runs for mean in means if mean is not None), default=0)
        columns = [[(v and v.estimate, interval(v)) for v in values] for values in zip(*found.values(), strict=True)]
        columns.append([(m.mean if m is not None and m.runs == most else None, across(m)) for m in means])
        cells = [_bold(dict(zip(methods, column, strict=True)), but=(OPTIMUM, PROXY_OPTIMUM)) for column in columns]
        rows += [[f"{kl:g}", method, *(column[method] for column in cells)] for method in methods]
    return _side_by_side("method", runs, rows)


def _bold(column: dict[str, tuple[float | None, str]], but: Collection[str] = ()) -> dict[str, str]:
    """The texts of a column by method; the best of them in bold, of all that have a value `but` some."""
    known = {name: (value, text) for name, (value, text) in column.items() if value is not None and name not in but}
    leading = best(known)
    return {name: f"**{text}**" if name in leading else text for name, (_, text) in column.items()}


def _without_kl(runs: Sequence[RunResults]) -> str:
    """The methods that are in no table at equal KL, as one with tokens of its own."""
    names = dict.fromkeys(m.name for run in runs for m in run.evidence.methods if m.name not in run.rewards)
    return f"Without a KL, and so not here: {', '.join(names)}." if names else ""


def _mixed(runs: Sequence[RunResults]) -> str:
    """What the means over runs mix beside the seeds."""
    sentences = [
        f"{method}'s {name} ({', '.join(map(str, values))})"
        for method, settings in differing_settings(runs).items()
        for name, values in settings.items()
    ]
    if sections := differing_sections(runs):
        sentences.append(f"the recipes' {', '.join(sections)}")
    return f"**The means are over different settings too**: {'; '.join(sentences)}." if sentences else ""


def _differences(runs: Sequence[RunResults], kls: Sequence[float]) -> str:
    rows = []
    for kl in kls:
        for pair in dict.fromkeys(pair for run in runs for pair in run.differences):
            found = [run.differences.get(pair, {}).get(kl) for run in runs]
            rows.append([f"{kl:g}", " − ".join(pair), *map(interval, found), across(difference_at(runs, pair, kl))])
    return _side_by_side("difference", runs, rows)


def _side_by_side(what: str, runs: Sequence[RunResults], rows: Sequence[Sequence[str]]) -> str:
    """Rows of KL, `what`, a cell for each run, and their mean; of a single run one row for each `what`, KLs beside."""
    if len(runs) > 1 or not rows:
        return _table(["KL (nats)", what, *(run.name for run in runs), "mean over runs"], rows)
    kls = list(dict.fromkeys(kl for kl, *_ in rows))
    cells = {(kl, name): cell for kl, name, cell, _ in rows}
    names = dict.fromkeys(name for _, name, *_ in rows)
    return _table(
        [what, *(f"{kl} nat{'s' * (kl != '1')}" for kl in kls)],
        [[name, *(cells[kl, name] for kl in kls)] for name in names],
    )


def _sweeps(runs: Sequence[RunResults]) -> tuple[str, ...]:
    """Every end of every sweep: where it aimed, and where it came; nothing without a sweep."""
    rows = []
    for run in runs:
        metrics = {curve.stage: curve.values for curve in run.evidence.curves}
        for method in run.evidence.methods:
            if (sweep := method.sweep) is None:
                continue
            for point in method.points:
                learnt = metrics.get(f"align/{method.name}/at-{point.step}", {}).get("reward_correlation") or [None]
                aim = [f"{sweep.setting} {sweep.values[point.step - 1]:g}", number(sweep.betas[point.step - 1])]
                reached = [interval(found) for found in (point.kl, point.reward, point.objective)]
                rows.append([run.name, method.name, *aim, *reached, number(learnt[-1], 2)])
    told = (
        f"A policy for each value; of kl it is the nats at which the optimum lies. {_OBJECTIVE} Correlation: of "
        "log-ratio and reward within a prompt, on the samples of the last steps of training; on given samples it is "
        "flattered by what was learnt by heart."
    )
    head = ["run", "method", "trained for", "β", "KL (nats)", "reward", "share of its objective", "correlation"]
    return ("## Ends of the sweeps", told, _table(head, rows)) if rows else ()


def _on_pairs(runs: Sequence[RunResults]) -> tuple[str, ...]:
    """What the last checkpoints make of held-out preferences; nothing where none was measured on them."""
    rows = []
    for name in dict.fromkeys(method.name for run in runs for method in run.evidence.methods):
        ends = [[m.points[-1] for m in run.evidence.methods if m.name == name and m.points] for run in runs]
        found = [end[0] if end and end[0].held_out else None for end in ends]
        shares = [end.held_out.accuracy.estimate for end in found if end and end.held_out]
        if shares and (mean := over_runs(shares)) is not None:
            cells = [
                f"{percent(end.held_out.accuracy)}, margin {interval(end.held_out.margin)}, KL {interval(end.kl)}"
                if end and end.held_out
                else "–"
                for end in found
            ]
            low, high = (None if bound is None else min(1.0, max(0.0, bound)) for bound in (mean.low, mean.high))
            over = f"{percent(Interval(mean.mean, low, high, mean.runs))}, n = {mean.runs}"
            rows.append([name, *cells, *([over] if len(runs) > 1 else [])])
    told = (
        "At the end of training, with 95 % intervals over prompts: accuracy is the share of held-out pairs whose "
        "preferred text gained more log-probability over the supervised policy than the other did (by chance 50 %), "
        f"the margin the mean of that difference in nats{'; the mean with Student’s interval' * (len(runs) > 1)}."
    )
    head = ["method", *(run.name for run in runs), *(["mean accuracy over runs"] if len(runs) > 1 else [])]
    return ("## Held-out pairs", told, _table(head, rows)) if rows else ()


def _ends(runs: Sequence[RunResults]) -> str:
    rows = [row for run in runs for row in _end_rows(run)]
    head = ["run", "method", "steps", "KL (nats)", "reward", "won against SFT", "at equal length"]
    return _table(
        [
            *head,
            "won against the reference texts",
            "at equal length",
            "share of its objective",
            "gap to the optimum",
            "at KL",
            "training",
        ],
        rows,
    )


def _end_rows(run: RunResults) -> Iterator[list[str]]:
    curves = run.evidence.curves
    if run.evidence.sft is not None:
        yield [run.name, "SFT", "0", "0", interval(run.evidence.sft.reward), *["–"] * 8]
    kinds, methods = product(("SFT", "reference texts"), ("rate", "at_equal_length")), run.evidence.methods
    won = [_bold({method.name: _won(method, *kind) for method in methods}) for kind in kinds]
    for method in run.evidence.methods:
        if method.points:
            stage, last = f"align/{method.name}", method.points[-1]
            yield [
                run.name,
                method.name,
                str(last.step) if method.sweep is None else f"{(n := len(method.points))} training{'s' * (n > 1)}",
                interval(last.kl),
                interval(last.reward),
                *(column[method.name] for column in won),
                interval(last.objective),
                interval(None if method.gap is None else method.gap.gap),
                number(None if method.gap is None else method.gap.kl),
                _training([c for c in curves if f"{c.stage}/".startswith(f"{stage}/")]),
            ]
    if run.evidence.best_of_n:
        best = run.evidence.best_of_n[-1]
        bound = f"≤ {number(best.kl_bound)}"
        yield [run.name, f"best of {best.n}", "–", bound, interval(best.reward), *["–"] * 8]


def _training(curves: Sequence[Curve]) -> str:
    """The time of the steps of all its trainings and, of one that draws in them, the share of drawing."""
    seconds, drawing = (_total([curve.total(name) for curve in curves]) for name in ("seconds", "drawing_seconds"))
    return duration(seconds) + (f" ({drawing / seconds:.0%} drawing)" if seconds and drawing is not None else "")


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _won(method: MethodEvidence, opponent: str, kind: str) -> tuple[float | None, str]:
    rate: Interval | None = next((getattr(won, kind) for won in method.win_rates if won.opponent == opponent), None)
    return None if rate is None else rate.estimate, percent(rate)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(head, rows).rstrip("\n") if rows else ""


STEPS = 40
"""KLs at which the figure is drawn, evenly up to the largest that is asked for."""
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


def write_differences(runs: Sequence[RunResults], folder: Path) -> Path | None:
    """Draw the figure to `folder` as PNG and SVG, with its data, n and interval under it; the PNG's path."""
    with figure_style():
        figure = draw_differences(runs, width=WIDTH)
        return None if figure is None else save_figure(figure, folder, "differences", _caption(runs))


def draw_differences(runs: Sequence[RunResults], *, width: float) -> Figure | None:
    """A panel for each pair that `compare` sets against each other: the difference of their rewards against KL.

    A line for each run, at the KLs that `runs` was read with. As far as all of them reach, a thick line is their mean
    with Student's 95 % interval; of a single run the interval is over prompts. None where no run has two such methods.
    """
    known = {pair: None for run in runs for pair, at in run.differences.items() if set(at.values()) - {None}}
    pairs = [pair for run in runs for pair in run.differences if pair in known]
    if not (pairs := list(dict.fromkeys(pairs))):
        return None
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(width, 0.6 + 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for empty in panels.flat[len(pairs) :]:
        empty.remove()
    for place, (panel, pair) in enumerate(zip(panels.flat, pairs, strict=False)):
        panel.set_xlabel("KL to the supervised policy (nats)" if place >= len(pairs) - columns else "")
        panel.set_title(drawable(" −\n".join(pair)) if len(" − ".join(pair)) > 24 else drawable(" − ".join(pair)))
        panel.axhline(0, color=LIGHT["muted"], linewidth=1.0)
        panel.tick_params(labelbottom=True)
        _panel(panel, runs, pair)
    for panel in panels[:, 0]:
        panel.set_ylabel("difference of rewards")
    shared_legend(figure, 5, handlelength=3.0)
    return figure


def _panel(axes: Axes, runs: Sequence[RunResults], pair: tuple[str, str]) -> None:
    having = [run for run in runs if pair in run.differences]
    axes.set_title(f"n = {len(having)}" if len(runs) > 1 else "", loc="right", fontweight="normal")
    for run, dashes in zip(runs, cycle(_DASHES), strict=False):
        found = [(kl, value) for kl, value in sorted(run.differences.get(pair, {}).items()) if value is not None]
        line = np.array([(kl, value.estimate, *value.ends) for kl, value in found])
        if found and len(runs) == 1:
            _thick(axes, line, drawable(run.name))
        elif found:
            axes.plot(*line.T[:2], linestyle=dashes, color=LIGHT["ink"], linewidth=0.9, label=drawable(run.name))
    means = [(kl, difference_at(having, pair, kl)) for kl in sorted(having[0].differences[pair])]
    common = [(kl, m.mean, m.low, m.high) for kl, m in means if m is not None and m.runs == len(having) > 1]
    if common:
        _thick(axes, np.array(common, dtype=float), "mean over runs")


def _thick(axes: Axes, line: np.ndarray, label: str) -> None:
    """`line` has columns KL, value, low, high."""
    kls, values, low, high = line.T
    axes.plot(kls, values, color=LIGHT["exo-1"], linewidth=2.2, label=label)
    axes.fill_between(kls, low, high, color=LIGHT["exo-1"], alpha=0.14, linewidth=0)


def _caption(runs: Sequence[RunResults]) -> str:
    prompts = " and ".join(str(n) for n in sorted({run.evidence.num_prompts for run in runs}))
    what = f"Rewards of {prompts} prompts, interpolated between checkpoints, paired by prompt. "
    if len(runs) == 1:
        return f"Run {runs[0].name}. {what}Band: 95 % bootstrap interval over prompts."
    return (
        f"n runs have both methods. {what}Band: Student's 95 % interval over those runs, as far as all of them reach."
    )


def selection_table(selected: Sequence[Selected], run: Path) -> Table:
    """For the terminal; a model that is no longer in the run is said to be gone."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    measure = "reward" if all(row.point.reward for row in selected) else "accuracy on held-out pairs"
    for name in ("method", "KL (nats)", measure, "model"):
        table.add_column(name, justify="left" if name.startswith("m") else "right", overflow="fold")
    for row in selected:
        there = RunFolder(run).policy(row.method, row.point.step).is_dir()
        place = shown(row.folder if there else f"{row.folder} (gone)")
        value = interval(row.point.reward) if row.point.reward else percent(row.point.measured)
        table.add_row(shown(row.method), interval(row.point.kl), value, place)
    return table
