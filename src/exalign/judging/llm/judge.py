"""Judging a set of pairs: ask what is missing, then write comparisons and summary from what is stored.

A folder of a judged match-up: `exchanges.jsonl` (everything asked and answered, as it came; the only file that cost
anything), and made from it each time: `comparisons.jsonl` (each order's verdict with its answer), `verdicts.jsonl` (one
verdict per pair) and `summary.json`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from exalign.judging.comparison import Comparison, write_comparisons
from exalign.judging.llm.asking import Patience, ask_all
from exalign.judging.llm.endpoint import Asker
from exalign.judging.llm.exchanges import (
    Answer,
    Body,
    ExchangeStore,
    Reply,
    parse_completion,
    read_answers,
    request_key,
    token_count,
)
from exalign.judging.llm.instructions import Instructions
from exalign.judging.llm.kappa import agreement_with
from exalign.judging.llm.pairs import Pair
from exalign.judging.llm.settings import JudgeSettings
from exalign.judging.llm.summary import summarise
from exalign.judging.llm.verdicts import ORDERS, Judgement, Keys, in_both_orders, judge_pair, together
from exalign.redaction import redact_values
from exalign.storage import fingerprint, write_json
from exalign.terminal import escape_controls, shown

CHARACTERS_PER_TOKEN = 4
"""Of English text under the tokenizers of today's models, roughly; only the estimate before asking uses it."""


@dataclass(frozen=True)
class Questions:
    """The pairs with the keys of their two questions each, and every question's request by its key."""

    keys: Sequence[tuple[Pair, Keys]]
    requests: Mapping[str, Body]


@dataclass(frozen=True)
class Estimate:
    """What judging would cost: `prompt_tokens` at four characters a token, `answer_tokens` at most."""

    pairs: int
    requests: int
    stored: int
    prompt_tokens: int
    answer_tokens: int


def questions(pairs: Sequence[Pair], instructions: Instructions, asker: Asker) -> Questions:
    """Both orders of every pair whose answers differ; equal requests are one question."""
    requests: dict[str, Body] = {}
    keyed: list[tuple[Pair, Keys]] = []
    for pair in pairs:
        keys = {}
        for left in () if pair.identical else ORDERS:
            body = asker.body(instructions.render(pair, left=left))
            keys[left] = request_key(body)
            requests[keys[left]] = body
        keyed.append((pair, keys))
    return Questions(keyed, requests)


def estimate(asked: Questions, folder: Path, settings: JudgeSettings) -> Estimate:
    """What is still to be asked, without asking or writing anything."""
    stored = read_answers(folder / "exchanges.jsonl")
    missing = [body for key, body in asked.requests.items() if key not in stored]
    characters = sum(len(body["messages"][0]["content"]) for body in missing)
    return Estimate(
        pairs=len(asked.keys),
        requests=len(missing),
        stored=len(asked.requests) - len(missing),
        prompt_tokens=round(characters / CHARACTERS_PER_TOKEN),
        answer_tokens=len(missing) * settings.max_answer_tokens,
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
        counts: Counter[str] = Counter(asked=0, answered=0, unanswered=0, attempts_failed=0)
        if stored < len(asked.requests):
            counts = asyncio.run(_ask(asked, asker, store, settings, console))
        judgements = [judge_pair(pair, keys, store.answers, asker.judge) for pair, keys in asked.keys]
        summary = {
            **summarise(judgements),
            "judge": asker.judge,
            **redact_values(about),
            "settings": redact_values(settings.model_dump(exclude={"key_variable"})),
            "asking": {**counts, "stored_before": stored, "seconds": round(time.monotonic() - start, 2)},
            "agreement": _agreements(judgements, others),
            "questions": fingerprint(sorted(asked.requests)),
        }
        write_comparisons(folder / "comparisons.jsonl", in_both_orders(judgements))
        write_comparisons(folder / "verdicts.jsonl", together(judgements))
        write_json(folder / "summary.json", summary)
    return summary


def _agreements(judgements: Sequence[Judgement], others: Mapping[str, Sequence[Comparison]]) -> list[dict[str, Any]]:
    ours = together(judgement for judgement in judgements if not judgement.pair.identical)
    found = ((name, agreement_with(ours, theirs)) for name, theirs in others.items())
    return [{"source": name, **result} for name, result in found if result is not None]


async def _ask(
    asked: Questions, asker: Asker, store: ExchangeStore, settings: JudgeSettings, console: Console
) -> Counter[str]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        display = _Display(progress, asker.judge, asked.requests, store.answers)
        return await ask_all(
            asked.requests,
            asker,
            store,
            attempts=settings.attempts,
            patience=Patience(settings.retry_wait, settings.away_wait),
            report=display.update,
        )


class _Display:
    """Answers per second, tokens, and failed attempts, while the questions are asked."""

    def __init__(
        self, progress: Progress, judge: str, requests: Mapping[str, Body], answers: Mapping[str, Answer]
    ) -> None:
        self.progress = progress
        self.stored = sum(key in answers for key in requests)
        self.task = progress.add_task(escape_controls(judge), total=len(requests), completed=self.stored, state="")
        self.start = time.monotonic()
        self.answered = self.tokens = self.failed = 0
        self.away = False

    def update(self, reply: Reply) -> None:
        if reply.outcome != "away":
            self.away = False
        elif not self.away:
            self.away = True
            self.progress.console.print(shown(f"Nobody answers: {reply.error}. Waiting until somebody does."))
        if reply.outcome == "answered":
            self.answered += 1
            usage = (parse_completion(reply.raw or "") or {}).get("usage")
            self.tokens += (token_count(usage.get("total_tokens")) or 0) if isinstance(usage, dict) else 0
        else:
            self.failed += 1
        rate = self.answered / max(time.monotonic() - self.start, 1e-3)
        state = f"{rate:.1f}/s · {self.tokens:,} tokens" + (f" · {self.failed} failed attempts" if self.failed else "")
        self.progress.update(self.task, completed=self.stored + self.answered, state=state)
