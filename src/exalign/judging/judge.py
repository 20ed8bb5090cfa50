"""`exalign judge`: a language model says which answers of a run are better."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from exalign.errors import InputError
from exalign.judging.askers import Asker, Endpoint, JudgeSettings, LocalModel
from exalign.judging.asking import estimate, judge_pairs, questions
from exalign.judging.instructions import load_instructions
from exalign.judging.judgements import other_judgements
from exalign.judging.options import with_settings
from exalign.judging.pairing import choose, match_ups
from exalign.judging.summary import CUT_OFF, NO_LINE, REFUSED
from exalign.terminal import shown

EndpointOption = Annotated[
    str | None, typer.Option(help="Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
]
ModelOption = Annotated[str | None, typer.Option(help="Name of the model at the endpoint.")]
PathOption = Annotated[
    str | None, typer.Option(help="Instead of an endpoint: folder or hub name of a transformers model to load here.")
]
BestOfOption = Annotated[
    int | None,
    typer.Option(min=1, help="Besides the methods, the best by reward of so many samples of SFT (evaluation/pool)."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be asked and what it would cost.")]

_TITLES = ("", "win", "tie", "lose", "win rate", "at equal length", "flips", "shown first", "unreadable", "tokens")


@with_settings(JudgeSettings)
def judge(
    run: Annotated[Path, typer.Argument(help="A run directory, or one method of it: RUN/evaluation/METHOD.")],
    against: Annotated[str, typer.Option(help="sft, chosen, a method of the same run, or another run directory.")],
    settings: JudgeSettings,
    endpoint: EndpointOption = None,
    model: ModelOption = None,
    model_path: PathOption = None,
    best_of: BestOfOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Ask a language model which answers are better: every method of RUN against one opponent.

    Every pair is asked about in both orders; a verdict that depends on the order is a tie. All that is asked and
    answered is kept in RUN/judging/llm, and a second run asks only what is missing there.
    """
    console = Console()
    instructions = load_instructions(settings.template)
    opened, found = match_ups(run, against, best_of)
    asker = asker_for(endpoint, model, model_path, settings)
    home = opened.judgements / slug(f"{asker.judge}-{instructions.name}")
    rows = []
    for match_up in found:
        folder = home / slug(f"{match_up.first}-vs-{match_up.second}")
        asked = questions(choose(match_up.pairs, prompts=settings.prompts, seed=settings.seed), instructions, asker)
        if dry_run:
            name = f"{match_up.first} against {match_up.second}"
            console.print(shown(estimate(name, asked, folder, settings)))
            continue
        about = {
            "first": match_up.first,
            "second": match_up.second,
            "template": instructions.name,
            "endpoint": endpoint,
            "sources": list(match_up.sources),
            "counts": dict(match_up.counts),
        }
        others = other_judgements(opened, folder)
        rows.append(judge_pairs(asked, asker, settings, folder, about=about, others=others, console=console))
    if not dry_run:
        _print_summaries(console, rows)
        finish(console, home, {f"{row['first']} – {row['second']}": row for row in rows})


def asker_for(endpoint: str | None, model: str | None, model_path: str | None, settings: JudgeSettings) -> Asker:
    """Who judges, as the options say."""
    if model_path is not None:
        if endpoint is not None or model is not None:
            raise InputError("Give either --endpoint and --model, or --model-path.")
        return LocalModel(model_path, settings)
    if endpoint is None or model is None:
        raise InputError("Who judges? Give --endpoint URL and --model NAME, or --model-path FOLDER.")
    return Endpoint(endpoint, model, settings)


def finish(console: Console, home: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Say where everything is and what could not be read; a match-up without any verdict is an `InputError`, and
    questions without an answer are exit status 1."""
    console.print(shown(f"Stored in {home}"))
    for name, row in rows.items():
        if row["unreadable_answers"] and row["measured_pairs"]:
            console.print(shown(f"{name}: {_unreadable(row)}."), soft_wrap=True)
    if missing := sum(row["asking"]["unanswered"] for row in rows.values()):
        why = next((f" ({row['last_error']})" for row in rows.values() if row["last_error"]), "")
        said = f"{missing:,} questions got no answer{why}; run the same command again to ask them."
        console.print(shown(said), soft_wrap=True)
    for name, row in rows.items():
        if not row["measured_pairs"] and row["answers"]:
            raise InputError(f"{name}: no pair has a readable verdict, so there is no win rate: {_unreadable(row)}.")
        if row["identical"] == row["pairs"]:
            raise InputError(f"{name}: all {row['pairs']:,} pairs hold the same answer twice: nothing to judge.")
    if missing:
        raise typer.Exit(1)


def _unreadable(row: dict[str, Any]) -> str:
    """What the unreadable answers look like, and what to do."""
    because, total = row["unreadable_because"], f"of {row['answers']:,} answers"
    asked = row["settings"]["request_fields"]
    limit, option = row["settings"]["max_answer_tokens"], "--max-answer-tokens"
    if "max_tokens" in asked:
        limit, option = asked["max_tokens"] or asked.get("max_completion_tokens"), "the limit in --request-fields"
    at = f" at {limit:,} tokens" if isinstance(limit, int) else ""
    sentences = {
        CUT_OFF: f"were cut off{at} (finish_reason length): raise {option}",
        REFUSED: "were refused or filtered by the model's provider",
        NO_LINE: f"end in no line “Verdict: A”, “Verdict: B” or “Verdict: tie”, but like “{row['unreadable_example']}”",
    }
    found = [f"{because[cause]:,} {total} {said}" for cause, said in sentences.items() if because.get(cause)]
    return "; ".join(found) or "the two orders of no pair were both readable"


def _print_summaries(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table()
    for title in _TITLES:
        table.add_column(title, justify="left" if not title else "right")
    for row in rows:
        tokens = row["tokens"]["prompt"] + row["tokens"]["completion"]
        table.add_row(
            shown(f"{row['first']} – {row['second']}"),
            *(percent(row[name], bounds=name == "score") for name in ("win", "tie", "lose", "score")),
            percent((row["length_controlled"] or {}).get("rate"), bounds=True),
            percent(row["flip_rate"]),
            percent(row["shown_first"]),
            f"{row['unreadable_pairs']} of {row['pairs']}",
            f"{tokens:,}",
        )
    console.print(table)
    for row in rows:
        for entry in row["agreement"]:
            console.print(shown(f"{row['first']} – {row['second']}: {agreement_text(entry)}"))


def agreement_text(entry: dict[str, Any]) -> str:
    """How far the judge agrees with others, in one line."""
    judges = entry["with"]
    who = ", ".join(judges) if len(judges) <= 3 else f"{len(judges)} judges"
    kappa = "–" if entry["kappa"] is None else f"{entry['kappa']:z.2f}"
    alpha = "–" if entry["alpha"] is None else f"{entry['alpha']['estimate']:z.2f}"
    among = entry["theirs_among_themselves"]
    bound = f" (they among themselves {percent(among)})" if among else ""
    return (
        f"agreement with {who} on {entry['pairs']} pairs: {percent(entry['raw'], bounds=True)}{bound}, without ties "
        f"{percent(entry['without_ties'])}, kappa {kappa}, alpha {alpha}"
    )


def percent(interval: dict[str, Any] | None, *, bounds: bool = False) -> str:
    """A share in percent, with its interval if `bounds`; a dash where it does not exist."""
    if interval is None:
        return "–"
    text = f"{100 * interval['estimate']:.1f} %"
    if not bounds or interval["low"] is None:
        return text
    # The widening of intervals for few prompts can reach beyond what a share can be.
    low, high = max(0.0, interval["low"]), min(1.0, interval["high"])
    return f"{text} ({100 * low:.0f}–{100 * high:.0f})"


def slug(text: str) -> str:
    """A name as a folder's."""
    return re.sub(r"[^\w.@-]+", "-", text).strip("-.") or "judge"
