"""`exalign judge`: a language model says which answers of a run are better; `exalign grade-judge`: how far such a
judge agrees with people. What is missing is asked, several at a time, with patience; then all is written from what is
stored.

A folder of a judged match-up: `exchanges.jsonl` (everything asked and answered, as it came; the only file that cost
anything), and made from it each time: `comparisons.jsonl` (each order's verdict with its answer), `verdicts.jsonl` (one
verdict per pair) and `summary.json`.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from exalign.errors import InputError
from exalign.evaluation.schema import Interval
from exalign.judging.agreement import agreement_with
from exalign.judging.askers import Asker, Endpoint, JudgeSettings, LocalModel
from exalign.judging.comparisons import Comparison, Pair, write_comparisons
from exalign.judging.exchanges import Body, ExchangeStore, Reply, read_answers, request_key
from exalign.judging.grading import read_human
from exalign.judging.instructions import Instructions, load_instructions
from exalign.judging.judgements import other_judgements
from exalign.judging.options import with_settings
from exalign.judging.pairing import choose, match_ups
from exalign.judging.summary import CUT_OFF, NO_LINE, ORDERS, REFUSED, Keys, judge_pair, summarise
from exalign.redaction import redact_values
from exalign.storage import fingerprint, write_json
from exalign.terminal import escape_controls, shown

EndpointOption = Annotated[
    str | None, typer.Option(help="Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
]
ModelOption = Annotated[str | None, typer.Option(help="Name of the model at the endpoint.")]
PathOption = Annotated[
    str | None, typer.Option(help="Instead of an endpoint: folder or hub name of a transformers model to load here.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be asked and what it would cost.")]


@with_settings(JudgeSettings)
def judge(
    run: Annotated[Path, typer.Argument(help="A run directory, or one method of it: RUN/evaluation/METHOD.")],
    against: Annotated[
        str, typer.Option(help="sft, chosen, a method of the same run, METHOD@STEP, or another run directory.")
    ],
    settings: JudgeSettings,
    endpoint: EndpointOption = None,
    model: ModelOption = None,
    model_path: PathOption = None,
    best_of: Annotated[
        int | None,
        typer.Option(
            min=1, help="Besides the methods, the best by reward of so many of SFT's samples (evaluation/pool)."
        ),
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Ask a language model which answers are better: every method of RUN against one opponent.

    Every pair is asked about in both orders; a verdict that depends on the order is a tie. All that is asked and
    answered is kept in RUN/judging/llm, and a second run asks only what is missing there.
    """
    console = Console()
    instructions = load_instructions(settings.template)
    opened, found = match_ups(run, against, best_of)
    asker = _asker_for(endpoint, model, model_path, settings)
    home = opened.judgements / _slug(f"{asker.judge}-{instructions.name}")
    rows = []
    for match_up in found:
        folder = home / _slug(f"{match_up.first}-vs-{match_up.second}")
        asked = questions(choose(match_up.pairs, prompts=settings.prompts, seed=settings.seed), instructions, asker)
        if dry_run:
            name = f"{match_up.first} against {match_up.second}"
            console.print(shown(estimate(name, asked, folder)))
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
        _finish(console, home, {f"{row['first']} – {row['second']}": row for row in rows})


@with_settings(JudgeSettings)
def grade_judge(
    file: Annotated[
        Path, typer.Argument(help="Comparisons that people made: ours, or a published set (JSONL, Parquet, …).")
    ],
    settings: JudgeSettings,
    endpoint: EndpointOption = None,
    model: ModelOption = None,
    model_path: PathOption = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; by default FILE-graded beside FILE.")] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Ask a language model about pairs that people have judged, and say how far it agrees with them."""
    console = Console()
    instructions = load_instructions(settings.template)
    counts: Counter[str] = Counter()
    human = read_human(file, counts)
    unique = {comparison.pair: comparison for comparison in reversed(human)}  # each pair once, as it was told first
    pairs = choose(unique.values(), prompts=settings.prompts, seed=settings.seed)
    asker = _asker_for(endpoint, model, model_path, settings)
    home = out if out is not None else file.with_name(f"{Path(file.name.removesuffix('.gz')).stem}-graded")
    folder = home / _slug(f"{asker.judge}-{instructions.name}")
    asked = questions(pairs, instructions, asker)
    if dry_run:
        console.print(shown(estimate(str(file), asked, folder)))
        return
    about = {"graded_on": str(file), "template": instructions.name, "endpoint": endpoint, "counts": dict(counts)}
    summary = judge_pairs(asked, asker, settings, folder, about=about, others={str(file): human}, console=console)
    _print_grade(console, summary)
    _finish(console, folder, {str(file): summary})


def _print_grade(console: Console, summary: dict[str, Any]) -> None:
    for entry in summary["agreement"]:
        console.print(shown(_agreement_text(entry)))
    said = (
        f"{summary['pairs']} pairs · flips {_percent(summary['flip_rate'])} · shown first "
        f"{_percent(summary['shown_first'])} · {summary['unreadable_pairs']} unreadable"
    )
    console.print(shown(said))


def _asker_for(endpoint: str | None, model: str | None, model_path: str | None, settings: JudgeSettings) -> Asker:
    if model_path is not None:
        if endpoint is not None or model is not None:
            raise InputError("Give either --endpoint and --model, or --model-path.")
        return LocalModel(model_path, settings)
    if endpoint is None or model is None:
        raise InputError("Who judges? Give --endpoint URL and --model NAME, or --model-path FOLDER.")
    return Endpoint(endpoint, model, settings)


_WHOLE = ("rows", "records", "prompts_available")
"""Counts of what there is; the others are of what was left out."""


def _finish(console: Console, home: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Say where everything is and what could not be read; a match-up without any verdict is an `InputError`, and
    questions without an answer are exit status 1."""
    console.print(shown(f"Stored in {home}"))
    for name, row in rows.items():
        if left := [f"{n:,} {what.replace('_', ' ')}" for what, n in row["counts"].items() if n and what not in _WHOLE]:
            console.print(shown(f"{name}: {', '.join(left)}."), soft_wrap=True)
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
    because, total = row["unreadable_because"], f"of {row['answers']:,} answers"
    fields = row["settings"]["request_fields"]
    limit = _limit({"max_tokens": row["settings"]["max_answer_tokens"], **fields})
    option = "the limit in --request-fields" if "max_tokens" in fields else "--max-answer-tokens"
    at = f" at {limit:,} tokens" if limit is not None else ""
    sentences = {
        CUT_OFF: f"were cut off{at} (finish_reason length): raise {option}",
        REFUSED: "were refused or filtered by the model's provider",
        NO_LINE: "end in no line “Verdict: A”, “Verdict: B” or “Verdict: tie”, but "
        + (
            f"like “{example}”"
            if (example := row["unreadable_example"])
            else "are empty (the model may only have thought)"
        ),
    }
    found = [f"{because[cause]:,} {total} {said}" for cause, said in sentences.items() if because.get(cause)]
    return "; ".join(found) or "the two orders of no pair were both readable"


def _limit(request: Mapping[str, Any]) -> int | None:
    """How many tokens the answer to a request may have; None where it does not say."""
    limit = request.get("max_tokens") or request.get("max_completion_tokens")
    return limit if isinstance(limit, int) else None


def _print_summaries(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table("")
    for title in ("win", "tie", "lose", "win rate", "at equal length", "flips", "shown first", "unreadable", "tokens"):
        table.add_column(title, justify="right")
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
    """A share in percent, with its interval if `bounds`; a dash where it does not exist."""
    if interval is None:
        return "–"
    share = Interval(**interval)
    text = f"{100 * share.estimate:.1f} %"
    if not bounds or share.low is None or share.high is None:
        return text
    return f"{text} ({100 * share.low:.0f}–{100 * share.high:.0f})"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.@-]+", "-", text).strip("-.") or "judge"


CHARACTERS_PER_TOKEN = 4
"""Of English text under the tokenizers of today's models, roughly; only the estimate before asking uses it."""
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0
GIVE_UP_AFTER = 10
"""Questions in a row that got no answer in all their attempts: the endpoint is down, waiting longer helps nobody."""


@dataclass(frozen=True)
class Questions:
    """The pairs with the keys of their two questions each, and every question's request by its key."""

    keys: Sequence[tuple[Pair, Keys]]
    requests: Mapping[str, Body]


def questions(pairs: Sequence[Pair], instructions: Instructions, asker: Asker) -> Questions:
    """Both orders of every pair whose answers differ; equal requests are one question."""
    requests: dict[str, Body] = {}
    keyed: list[tuple[Pair, Keys]] = []
    for pair in pairs:
        bodies = {} if pair.identical else {left: asker.body(instructions.render(pair, left=left)) for left in ORDERS}
        keys = {left: request_key(body) for left, body in bodies.items()}
        requests |= {keys[left]: body for left, body in bodies.items()}
        keyed.append((pair, keys))
    return Questions(keyed, requests)


def estimate(name: str, asked: Questions, folder: Path) -> str:
    """What judging would still cost, without asking or writing anything: tokens to read at four characters each."""
    stored = read_answers(folder / "exchanges.jsonl")
    missing = [body for key, body in asked.requests.items() if key not in stored]
    characters = sum(len(body["messages"][0]["content"]) for body in missing)
    limits = [limit for body in missing if (limit := _limit(body)) is not None]
    most = f"at most {sum(limits):,}" if len(limits) == len(missing) else "any number"
    return (
        f"{name}: {len(asked.keys):,} pairs, {len(missing):,} requests to make ({len(asked.requests) - len(missing):,} "
        f"answered before), about {round(characters / CHARACTERS_PER_TOKEN):,} tokens to read and {most} to write."
    )


def judge_pairs(
    asked: Questions,
    asker: Asker,
    settings: JudgeSettings,
    folder: Path,
    *,
    about: Mapping[str, Any],
    others: Mapping[str, Sequence[Comparison]],
    console: Console,
) -> dict[str, Any]:
    """Ask what is missing, write the folder's files, and return the summary.

    `about` is put into the summary; `others` are comparisons by other judges, by where they come from, whose agreement
    with this judge is computed where they judged the same pairs. A run that is killed has stored every answer that
    came.
    """
    with ExchangeStore(folder / "exchanges.jsonl") as store:
        if store.torn:
            console.print("The last exchange was cut off by an interrupted run; it is asked again.")
        start, stored = time.monotonic(), sum(key in store.answers for key in asked.requests)
        asking = _Asking(asked, asker, store, settings, console)
        if stored < len(asked.requests):
            asyncio.run(asking.everything())
        judgements = [judge_pair(pair, keys, store.answers, asker.judge) for pair, keys in asked.keys]
        verdicts = [judgement.verdict for judgement in judgements if judgement.verdict is not None]
        ours = [verdict for verdict in verdicts if not verdict.identical]
        agreements = {name: agreement_with(ours, theirs) for name, theirs in others.items()}
        summary = {
            **summarise(judgements),
            "judge": asker.judge,
            **redact_values(about),
            "settings": redact_values(settings.model_dump(exclude={"key_variable"})),
            "asking": {**asking.counts, "stored_before": stored, "seconds": round(time.monotonic() - start, 2)},
            "last_error": asking.last_error,
            "agreement": [{"source": name, **found} for name, found in agreements.items() if found],
            "questions": fingerprint(sorted(asked.requests)),
        }
        summary = json.loads(json.dumps(summary, default=asdict))  # intervals as their fields
        orders = (comparison for judgement in judgements for comparison in judgement.orders)
        write_comparisons(folder / "comparisons.jsonl", orders)
        write_comparisons(folder / "verdicts.jsonl", verdicts)
        write_json(folder / "summary.json", summary)
    return summary


def back_off(first_wait: float, attempt: int, retry_after: float | None) -> float:
    """Seconds before attempt n + 1: w·2^(n−1), at most a minute, times a random factor in [0.5, 1]: those who failed
    together do not come back together. `Retry-After` is a lower bound, never shortened by the jitter.

    >>> all(2 <= back_off(1.0, 3, None) <= 4 for _ in range(99)), 7 <= back_off(1.0, 1, 7.0) <= 8
    (True, True)
    """
    seconds = min(LONGEST_WAIT, first_wait * 2 ** min(attempt - 1, 30)) * random.uniform(0.5, 1)
    return seconds if retry_after is None else retry_after + min(seconds, 1.0)


class _Asking:
    """The one loop that asks, and what its workers share.

    `counts` says what happened: `asked`, `answered`, `attempts_failed`, `unanswered`. `stop` says why no further
    attempt is made; those under way still end, and are stored. Until `resume_at` all questions wait.
    """

    def __init__(
        self, asked: Questions, asker: Asker, store: ExchangeStore, settings: JudgeSettings, console: Console
    ) -> None:
        self.asker, self.store, self.settings, self.console = asker, store, settings, console
        self.missing = {key: body for key, body in asked.requests.items() if key not in store.answers}
        self.counts: Counter[str] = Counter(asked=len(self.missing), answered=0, unanswered=0, attempts_failed=0)
        self.total, self.failed_in_a_row = len(asked.requests), 0
        self.resume_at, self.times_away = 0.0, 0
        self.away_since: float | None = None
        self.stop: str | None = None
        self.last_error: str | None = None

    async def everything(self) -> None:
        """Ask every request that the store has no answer to, each up to `attempts` times.

        An endpoint that can answer nothing (its key, address or model is wrong, it is down, or asks to wait longer than
        ten minutes) raises `InputError`; every answer up to then is stored.
        """
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed attempts"),
            TimeRemainingColumn(),
        )
        waiting = iter(self.missing.items())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as self.progress:
            done = self.total - len(self.missing)
            name = escape_controls(self.asker.judge)
            self.task = self.progress.add_task(name, total=self.total, completed=done, failed=0)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.asker.concurrency, len(self.missing))):
                        group.create_task(self._work(waiting))
            except* InputError as errors:
                raise errors.exceptions[0] from None
            finally:
                await self.asker.close()
        if self.stop is not None:
            raise InputError(f"{self.stop} The answers so far are stored: run again to ask the rest.")

    async def _work(self, waiting: Iterator[tuple[str, Body]]) -> None:
        while self.stop is None and (question := next(waiting, None)) is not None:
            reply = await self._until_answered(*question)
            if reply is not None and reply.outcome == "answered":
                self.counts["answered"] += 1
                self.failed_in_a_row = 0
                continue
            self.counts["unanswered"] += 1
            # A question that is refused says nothing of the next one, where any was ever answered.
            known = self.total - len(self.missing) + self.counts["answered"]
            self.failed_in_a_row += not (known and reply is not None and reply.outcome == "refused")
            if reply is not None:
                self.last_error = reply.error
                if self.failed_in_a_row >= GIVE_UP_AFTER and self.stop is None:
                    said = f"{GIVE_UP_AFTER} questions in a row got no answer"
                    self.stop = f"{said} from {self.asker.judge} ({reply.error})."

    async def _until_answered(self, key: str, body: Body) -> Reply | None:
        """The last attempt's reply; None where asking stopped before the first."""
        reply, attempt = None, 0
        while attempt < self.settings.attempts:
            while (rest := self.resume_at - time.monotonic()) > 0:
                await asyncio.sleep(rest)
            if self.stop is not None:
                break
            reply = await self.asker.attempt(body)
            if reply.outcome == "away" and self._waits_for_it(reply):
                continue
            if (
                reply.outcome == "answered" or reply.http_status is not None
            ):  # not a connection that broke as it went away
                self.away_since, self.times_away = None, 0
            attempt += 1
            self.store.append(key, body, reply)
            answered = reply.outcome == "answered"
            self.counts["attempts_failed"] += not answered
            self.progress.update(self.task, advance=answered, failed=self.counts["attempts_failed"])
            if reply.outcome == "fatal":
                self.stop = f"{self.asker.judge} cannot be asked: {reply.error}."
            if reply.outcome not in ("again", "away"):
                break
            if reply.retry_after is not None and reply.retry_after > LONGEST_RETRY_AFTER:
                self.stop = f"{self.asker.judge} asks to wait {reply.retry_after:,.0f} s."
                break
            self._pause(reply.retry_after or 0.0)
            if attempt < self.settings.attempts:
                await asyncio.sleep(back_off(self.settings.retry_wait, attempt, reply.retry_after))
        return reply

    def _waits_for_it(self, reply: Reply) -> bool:
        """Nobody answers: let all questions wait, longer each time; False where that has gone on for `away_wait`."""
        now = time.monotonic()
        if self.away_since is None:
            self.away_since = now
            if self.settings.away_wait:
                self.console.print(shown(f"Nobody answers: {reply.error}. Waiting until somebody does."))
        rest = self.away_since + self.settings.away_wait - now
        if rest > 0 and now >= self.resume_at:  # else another question has found it out already
            self.times_away += 1
            self._pause(min(back_off(self.settings.retry_wait, self.times_away, None), rest))
        return rest > 0

    def _pause(self, seconds: float) -> None:
        self.resume_at = max(self.resume_at, time.monotonic() + seconds)
