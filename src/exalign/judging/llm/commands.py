"""`exalign judge` and `exalign grade-judge`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from exalign.errors import InputError
from exalign.judging.llm.endpoint import Asker, Endpoint
from exalign.judging.llm.grading import human_pairs, read_human
from exalign.judging.llm.instructions import Instructions, load_instructions
from exalign.judging.llm.judge import Questions, estimate, judge_pairs, questions
from exalign.judging.llm.local import LocalModel
from exalign.judging.llm.options import read_settings, with_settings
from exalign.judging.llm.others import other_judgements
from exalign.judging.llm.pairs import MatchUp, match_ups, open_run
from exalign.judging.llm.settings import JudgeSettings
from exalign.terminal import shown

EndpointOption = Annotated[
    str | None, typer.Option(help="Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
]
ModelOption = Annotated[str | None, typer.Option(help="Name of the model at the endpoint.")]
PathOption = Annotated[
    str | None, typer.Option(help="Instead of an endpoint: folder or hub name of a transformers model to load here.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be asked and what it would cost.")]

_TITLES = ("", "win", "tie", "lose", "win rate", "at equal length", "flips", "shown first", "unreadable", "tokens")


@with_settings(JudgeSettings)
def judge(
    run: Annotated[Path, typer.Argument(help="A run directory, or one method of it: RUN/evaluation/METHOD.")],
    against: Annotated[str, typer.Option(help="sft, chosen, a method of the same run, or another run directory.")],
    endpoint: EndpointOption = None,
    model: ModelOption = None,
    model_path: PathOption = None,
    dry_run: DryRunOption = False,
    **options: Any,
) -> None:
    """Ask a language model which answers are better: every method of RUN against one opponent.

    Every pair is asked about in both orders; a verdict that depends on the order is a tie. All that is asked and
    answered is kept in RUN/judging/llm, and a second run asks only what is missing there.
    """
    console = Console()
    settings = read_settings(JudgeSettings, options)
    instructions = load_instructions(settings.template)
    opened = open_run(run)
    found = match_ups(opened, against, prompts=settings.prompts, seed=settings.seed)
    asker = _asker(endpoint, model, model_path, settings)
    home = opened.root / "judging" / "llm" / _slug(f"{asker.judge}-{instructions.name}")
    rows = []
    for match_up in found:
        folder = home / _slug(f"{match_up.first}-vs-{match_up.second}")
        asked = questions(match_up.pairs, instructions, asker)
        if dry_run:
            _print_estimate(console, f"{match_up.first} against {match_up.second}", asked, folder, settings)
            continue
        others = other_judgements(opened.root, folder)
        about = _about(match_up, instructions, endpoint)
        rows.append(judge_pairs(asked, asker, settings, folder, about=about, others=others, console=console))
    if not dry_run:
        _print_summaries(console, rows)
        console.print(shown(f"Stored in {home}"))
        _exit_if_unanswered(console, rows)


@with_settings(JudgeSettings)
def grade_judge(
    file: Annotated[
        Path, typer.Argument(help="Comparisons that people made: ours, or a published set (JSONL, Parquet, …).")
    ],
    endpoint: EndpointOption = None,
    model: ModelOption = None,
    model_path: PathOption = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; by default FILE-graded beside FILE.")] = None,
    dry_run: DryRunOption = False,
    **options: Any,
) -> None:
    """Ask a language model about pairs that people have judged, and say how far it agrees with them."""
    console = Console()
    settings = read_settings(JudgeSettings, options)
    instructions = load_instructions(settings.template)
    counts: Counter[str] = Counter()
    human = read_human(file, counts)
    pairs = human_pairs(human, prompts=settings.prompts, seed=settings.seed)
    asker = _asker(endpoint, model, model_path, settings)
    home = out if out is not None else file.with_name(f"{file.name.split('.')[0]}-graded")
    folder = home / _slug(f"{asker.judge}-{instructions.name}")
    asked = questions(pairs, instructions, asker)
    if dry_run:
        _print_estimate(console, str(file), asked, folder, settings)
        return
    about = {"graded_on": str(file), "template": instructions.name, "endpoint": endpoint, "counts": dict(counts)}
    summary = judge_pairs(asked, asker, settings, folder, about=about, others={str(file): human}, console=console)
    _print_grade(console, summary)
    console.print(shown(f"Stored in {folder}"))
    _exit_if_unanswered(console, [summary])


def _asker(endpoint: str | None, model: str | None, model_path: str | None, settings: JudgeSettings) -> Asker:
    if model_path is not None:
        if endpoint is not None or model is not None:
            raise InputError("Give either --endpoint and --model, or --model-path.")
        return LocalModel(model_path, settings)
    if endpoint is None or model is None:
        raise InputError("Who judges? Give --endpoint URL and --model NAME, or --model-path FOLDER.")
    return Endpoint(endpoint, model, settings)


def _about(match_up: MatchUp, instructions: Instructions, endpoint: str | None) -> dict[str, Any]:
    return {
        "first": match_up.first,
        "second": match_up.second,
        "template": instructions.name,
        "endpoint": endpoint,
        "sources": list(match_up.sources),
        "counts": dict(match_up.counts),
    }


def _print_estimate(console: Console, name: str, asked: Questions, folder: Path, settings: JudgeSettings) -> None:
    cost = estimate(asked, folder, settings)
    said = (
        f"{name}: {cost.pairs:,} pairs, {cost.requests:,} requests to make ({cost.stored:,} answered before), "
        f"about {cost.prompt_tokens:,} tokens to read and at most {cost.answer_tokens:,} to write."
    )
    console.print(shown(said))


def _print_summaries(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table()
    for title in _TITLES:
        table.add_column(title, justify="left" if not title else "right")
    for row in rows:
        tokens = row["tokens"]["prompt"] + row["tokens"]["completion"]
        table.add_row(
            shown(f"{row['first']} – {row['second']}"),
            *(_percent(row[name], bounds=name == "score") for name in ("win", "tie", "lose", "score")),
            _percent((row["length_controlled"] or {}).get("rate"), bounds=True),
            _percent(row["flip_rate"]),
            _percent(row["shown_first"]),
            f"{row['unreadable_pairs']} of {row['pairs']}",
            f"{tokens:,}",
        )
    console.print(table)
    for row in rows:
        for entry in row["agreement"]:
            console.print(shown(f"{row['first']} – {row['second']}: {_agreement_text(entry)}"))


def _print_grade(console: Console, summary: dict[str, Any]) -> None:
    for entry in summary["agreement"]:
        console.print(shown(_agreement_text(entry)))
    if not summary["agreement"]:
        console.print("No pair has a readable verdict: nothing to compare with people.")
    said = (
        f"{summary['pairs']} pairs · flips {_percent(summary['flip_rate'])} · shown first "
        f"{_percent(summary['shown_first'])} · {summary['unreadable_pairs']} unreadable"
    )
    console.print(shown(said))


def _agreement_text(entry: dict[str, Any]) -> str:
    judges = entry["with"]
    who = ", ".join(judges) if len(judges) <= 3 else f"{len(judges)} judges"
    kappa = "–" if entry["kappa"] is None else f"{entry['kappa']:z.2f}"
    alpha = "–" if entry["alpha"] is None else f"{entry['alpha']['estimate']:z.2f}"
    among = entry["theirs_among_themselves"]
    bound = f" (they among themselves {_percent(among)})" if among else ""
    return (
        f"agreement with {who} on {entry['pairs']} pairs: {_percent(entry['raw'], bounds=True)}{bound}, without ties "
        f"{_percent(entry['without_ties'])}, kappa {kappa}, alpha {alpha}"
    )


def _percent(interval: dict[str, Any] | None, *, bounds: bool = False) -> str:
    if interval is None:
        return "–"
    text = f"{100 * interval['estimate']:.1f} %"
    if not bounds or interval["low"] is None:
        return text
    # The widening of intervals for few prompts can reach beyond what a share can be.
    low, high = max(0.0, interval["low"]), min(1.0, interval["high"])
    return f"{text} ({100 * low:.0f}–{100 * high:.0f})"


def _exit_if_unanswered(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    if missing := sum(row["asking"]["unanswered"] for row in rows):
        console.print(f"{missing:,} questions got no answer; run the same command again to ask them.")
        raise typer.Exit(1)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.@-]+", "-", text).strip("-.") or "judge"
