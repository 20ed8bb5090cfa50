"""Judging a set of pairs: ask what is missing, several at a time, with patience; then write from what is stored.

A folder of a judged match-up: `exchanges.jsonl` (everything asked and answered, as it came; the only file that cost
anything), and made from it each time: `comparisons.jsonl` (each order's verdict with its answer), `verdicts.jsonl` (one
verdict per pair) and `summary.json`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from exalign.errors import InputError
from exalign.judging.agreement import agreement_with
from exalign.judging.askers import Asker, JudgeSettings
from exalign.judging.comparisons import Comparison, Pair, write_comparisons
from exalign.judging.exchanges import (
    Body,
    ExchangeStore,
    Reply,
    parse_completion,
    read_answers,
    request_key,
    token_count,
)
from exalign.judging.instructions import Instructions
from exalign.judging.summary import ORDERS, Keys, in_both_orders, judge_pair, summarise, together
from exalign.redaction import redact_values
from exalign.storage import fingerprint, write_json
from exalign.terminal import escape_controls, shown

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


def estimate(name: str, asked: Questions, folder: Path, settings: JudgeSettings) -> str:
    """What judging would still cost, without asking or writing anything: tokens to read at four characters each."""
    stored = read_answers(folder / "exchanges.jsonl")
    missing = [body for key, body in asked.requests.items() if key not in stored]
    characters = sum(len(body["messages"][0]["content"]) for body in missing)
    return (
        f"{name}: {len(asked.keys):,} pairs, {len(missing):,} requests to make ({len(asked.requests) - len(missing):,} "
        f"answered before), about {round(characters / CHARACTERS_PER_TOKEN):,} tokens to read and at most "
        f"{len(missing) * settings.max_answer_tokens:,} to write."
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
        ours = [verdict for verdict in together(judgements) if not verdict.identical]
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
        write_comparisons(folder / "comparisons.jsonl", in_both_orders(judgements))
        write_comparisons(folder / "verdicts.jsonl", together(judgements))
        write_json(folder / "summary.json", summary)
    return summary


class Patience:
    """How long to wait before attempt n + 1, and a pause that all questions share when the endpoint asks for one."""

    def __init__(self, first_wait: float, away_wait: float = 0.0) -> None:
        self.first_wait, self.away_wait = first_wait, away_wait
        self._resume_at = 0.0
        self._away_since: float | None = None
        self._tries = 0

    def seconds(self, attempt: int, retry_after: float | None) -> float:
        """Exponential back-off w·2^(n−1), at most a minute, times a random factor in [0.5, 1]: those who failed
        together do not come back together. `Retry-After` is a lower bound, never shortened by the jitter.

        >>> patience = Patience(1.0)
        >>> all(2 <= patience.seconds(3, None) <= 4 for _ in range(99)), 7 <= patience.seconds(1, 7.0) <= 8
        (True, True)
        """
        back_off = min(LONGEST_WAIT, self.first_wait * 2 ** min(attempt - 1, 30)) * random.uniform(0.5, 1)
        return back_off if retry_after is None else retry_after + min(back_off, 1.0)

    def pause_while_away(self) -> bool:
        """Nobody answers: let all questions wait, longer each time; False where that has gone on for `away_wait`."""
        now = time.monotonic()
        self._away_since = now if self._away_since is None else self._away_since
        if now - self._away_since >= self.away_wait:
            return False
        if now >= self._resume_at:  # else another question has found it out already
            self._tries += 1
            rest = self._away_since + self.away_wait - now
            self.pause_all(min(self.seconds(self._tries, None), rest))
        return True

    def is_back(self) -> None:
        """Somebody answered."""
        self._away_since, self._tries = None, 0

    def pause_all(self, seconds: float) -> None:
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    async def wait(self) -> None:
        while (rest := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(rest)


class _Asking:
    """The one loop that asks, and what its workers share.

    `counts` says what happened: `asked`, `answered`, `attempts_failed`, `unanswered`. `stop` says why no further
    attempt is made; those under way still end, and are stored.
    """

    def __init__(
        self, asked: Questions, asker: Asker, store: ExchangeStore, settings: JudgeSettings, console: Console
    ) -> None:
        self.asker, self.store, self.attempts = asker, store, settings.attempts
        self.patience = Patience(settings.retry_wait, settings.away_wait)
        self.missing = {key: body for key, body in asked.requests.items() if key not in store.answers}
        self.counts: Counter[str] = Counter(asked=len(self.missing), answered=0, unanswered=0, attempts_failed=0)
        self.total, self.stored = len(asked.requests), len(store.answers)
        self.console = console
        self.tokens = self.failed_in_a_row = 0
        self.start = time.monotonic()
        self.away = False
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
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        waiting = iter(self.missing.items())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as self.progress:
            self.task = self.progress.add_task(escape_controls(self.asker.judge), total=self.total, state="")
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
            self.failed_in_a_row += 1
            if reply is not None:
                self.last_error = reply.error
                if self.failed_in_a_row >= GIVE_UP_AFTER and self.stop is None:
                    said = f"{GIVE_UP_AFTER} questions in a row got no answer"
                    self.stop = f"{said} from {self.asker.judge} ({reply.error})."

    async def _until_answered(self, key: str, body: Body) -> Reply | None:
        """The last attempt's reply; None where asking stopped before the first."""
        reply = None
        attempt = 1
        while attempt <= self.attempts:
            await self.patience.wait()
            if self.stop is not None:
                break
            reply = await self.asker.attempt(body)
            if reply.outcome != "away":
                self.away = False
                self.patience.is_back()
            elif self.patience.pause_while_away():
                if not self.away:
                    self.away = True
                    self.console.print(shown(f"Nobody answers: {reply.error}. Waiting until somebody does."))
                continue
            self.store.append(key, body, reply)
            self._show(reply)
            if reply.outcome == "answered":
                break
            if reply.outcome == "fatal":
                self.stop = f"{self.asker.judge} cannot be asked: {reply.error}."
            if reply.outcome not in ("again", "away"):
                break
            await self._rest(attempt, reply)
            attempt += 1
        return reply

    async def _rest(self, attempt: int, reply: Reply) -> None:
        if reply.retry_after is not None:
            if reply.retry_after > LONGEST_RETRY_AFTER:
                self.stop = f"{self.asker.judge} asks to wait {reply.retry_after:,.0f} s."
                return
            self.patience.pause_all(reply.retry_after)
        if attempt < self.attempts:
            await asyncio.sleep(self.patience.seconds(attempt, reply.retry_after))

    def _show(self, reply: Reply) -> None:
        """Answers per second, tokens, and failed attempts, while the questions are asked."""
        self.counts["attempts_failed"] += reply.outcome != "answered"
        usage = (parse_completion(reply.raw or "") or {}).get("usage") if reply.outcome == "answered" else None
        self.tokens += (token_count(usage.get("total_tokens")) or 0) if isinstance(usage, dict) else 0
        answered = len(self.store.answers) - self.stored
        failed = self.counts["attempts_failed"]
        rate = answered / max(time.monotonic() - self.start, 1e-3)
        state = f"{rate:.1f}/s · {self.tokens:,} tokens" + (f" · {failed} failed attempts" if failed else "")
        done = self.total - len(self.missing) + answered
        self.progress.update(self.task, completed=done, state=state)
