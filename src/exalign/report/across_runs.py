"""Several runs of one experiment as Markdown tables: reward at equal KL, and where each method ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exalign.evaluation.across_runs import AcrossRuns, RunResults, difference_at, differing_settings, over_runs
from exalign.evaluation.schema import MethodEvidence
from exalign.report.wording import duration, interval, number, percent


def tables(runs: Sequence[RunResults], kls: Sequence[float]) -> str:
    """The page: every run of every method is in it, and every mean says how many runs it is of."""
    methods = list(dict.fromkeys(method for run in runs for method in run.rewards))
    several, differences = len(runs) > 1, _differences(runs, kls)
    parts = [
        "## Reward at equal KL",
        "With 95 % intervals over prompts"
        + ("; the mean over runs with Student's. " if several else ". ")
        + "“–”: the method does not reach this KL.",
        _at_equal_kl(runs, methods, kls),
        _mixed(runs),
        *(_differences_heading(several) if differences else ()),
        differences,
        "## Last checkpoints",
        "The gap is the estimated optimum's reward less the method's, at the KL given with it. Training is the time of "
        "the optimizer steps, with the sampling of methods that sample while they train.",
        _ends(runs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def across(value: AcrossRuns | None) -> str:
    """A mean over runs as text.

    >>> across(AcrossRuns(1.234, 1.1, 1.4, 3)), across(AcrossRuns(1.0, None, None, 1)), across(None)
    ('1.23 [1.10, 1.40], n = 3', '1.00, n = 1', '–')
    """
    if value is None:
        return "–"
    bounds = "" if value.low is None or value.high is None else f" [{value.low:.2f}, {value.high:.2f}]"
    return f"{value.mean:.2f}{bounds}, n = {value.runs}".replace("-", "−")


def _at_equal_kl(runs: Sequence[RunResults], methods: Sequence[str], kls: Sequence[float]) -> str:
    rows = []
    for kl in kls:
        for method in methods:
            found = [run.rewards.get(method, {}).get(kl) for run in runs]
            mean = over_runs([value.estimate for value in found if value is not None])
            rows.append([f"{kl:g}", method, *map(interval, found), across(mean)])
    return _side_by_side("method", runs, rows)


def _mixed(runs: Sequence[RunResults]) -> str:
    """What the means over runs mix beside the seeds."""
    sentences = [
        f"{method}'s {name} ({', '.join(map(str, values))})"
        for method, settings in differing_settings(runs).items()
        for name, values in settings.items()
    ]
    return f"**The means are over different settings too**: {'; '.join(sentences)}." if sentences else ""


def _differences(runs: Sequence[RunResults], kls: Sequence[float]) -> str:
    rows = []
    for kl in kls:
        for pair in dict.fromkeys(pair for run in runs for pair in run.differences):
            found = [run.differences.get(pair, {}).get(kl) for run in runs]
            rows.append([f"{kl:g}", " − ".join(pair), *map(interval, found), across(difference_at(runs, pair, kl))])
    return _side_by_side("difference", runs, rows)


def _differences_heading(several: bool) -> tuple[str, str]:
    paired = " within a run; the mean over runs with Student's interval" if several else ""
    return "## Differences at equal KL", f"EXO less DPO on the same target, and less PPO, paired by prompt{paired}."


def _side_by_side(what: str, runs: Sequence[RunResults], rows: Sequence[Sequence[str]]) -> str:
    """Rows of KL, `what`, a cell for each run, and their mean; of a single run one row for each `what`, KLs beside."""
    if len(runs) > 1:
        return _markdown(["KL (nats)", what, *(run.name for run in runs), "mean over runs"], rows)
    kls = list(dict.fromkeys(kl for kl, *_ in rows))
    cells = {(kl, name): cell for kl, name, cell, _ in rows}
    names = dict.fromkeys(name for _, name, *_ in rows)
    return _markdown(
        [what, *(f"{kl} nat{'s' * (kl != '1')}" for kl in kls)],
        [[name, *(cells[kl, name] for kl in kls)] for name in names],
    )


def _ends(runs: Sequence[RunResults]) -> str:
    rows = [row for run in runs for row in _end_rows(run)]
    head = ["run", "method", "steps", "KL (nats)", "reward", "won against SFT", "won against the reference texts"]
    return _markdown([*head, "gap to the optimum", "at KL", "training"], rows)


def _end_rows(run: RunResults) -> Iterator[list[str]]:
    curves = {curve.stage: curve for curve in run.evidence.curves}
    if run.evidence.sft is not None:
        yield [run.name, "SFT", "0", "0", interval(run.evidence.sft.reward), "–", "–", "–", "–", "–"]
    for method in run.evidence.methods:
        if method.points:
            curve = curves.get(f"align/{method.name}")
            yield [run.name, *_end(method), duration(None if curve is None else curve.total("seconds"))]
    if run.evidence.best_of_n:
        best = run.evidence.best_of_n[-1]
        bound = f"≤ {number(best.kl_bound)}"
        yield [run.name, f"best of {best.n}", "–", bound, interval(best.reward), "–", "–", "–", "–", "–"]


def _end(method: MethodEvidence) -> list[str]:
    last, gap = method.points[-1], method.gap
    rates = {rate.opponent: percent(rate.rate) for rate in method.win_rates}
    return [
        method.name,
        str(last.step),
        interval(last.kl),
        interval(last.reward),
        rates.get("SFT", "–"),
        rates.get("reference texts", "–"),
        interval(None if gap is None else gap.gap),
        number(None if gap is None else gap.kl),
    ]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
