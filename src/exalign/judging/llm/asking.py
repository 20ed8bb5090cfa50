"""The one loop that asks: what is missing, several at a time, with patience."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from exalign.errors import InputError
from exalign.judging.llm.endpoint import Asker
from exalign.judging.llm.exchanges import Body, ExchangeStore, Reply

LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0
GIVE_UP_AFTER = 10
"""Questions in a row that got no answer in all their attempts: the endpoint is down, waiting longer helps nobody."""


class Patience:
    """How long to wait before attempt n + 1, and a pause that all questions share when the endpoint asks for one."""

    def __init__(self, first_wait: float, away_wait: float = 0.0) -> None:
        self.first_wait = first_wait
        self.away_wait = away_wait
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
        self._away_since, self._tries = None, 0

    def pause_all(self, seconds: float) -> None:
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    async def wait(self) -> None:
        while (rest := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(rest)


async def ask_all(
    requests: Mapping[str, Body],
    asker: Asker,
    store: ExchangeStore,
    *,
    attempts: int,
    patience: Patience,
    report: Callable[[Reply], None] = lambda reply: None,
) -> Counter[str]:
    """Ask every request that `store` has no answer to, each up to `attempts` times.

    Returns what happened: `asked`, `answered`, `attempts_failed`, `unanswered`. An endpoint that can answer nothing
    (its key, address or model is wrong, it is down, or asks to wait longer than ten minutes) raises `InputError`; every
    answer up to then is stored. `report` is told of each attempt's reply.
    """
    missing = {key: body for key, body in requests.items() if key not in store.answers}
    waiting = iter(missing.items())
    line = _Line(asker, store, attempts, patience, report)
    line.counts["asked"] = len(missing)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(asker.concurrency, len(missing))):
                group.create_task(line.work(waiting))
    except* InputError as errors:
        raise errors.exceptions[0] from None
    finally:
        await asker.close()
    if line.stop is not None:
        raise InputError(f"{line.stop} The answers so far are stored: run again to ask the rest.")
    return line.counts


class _Line:
    """What the workers share. `stop` says why no further attempt is made; those under way still end, and are stored."""

    def __init__(
        self,
        asker: Asker,
        store: ExchangeStore,
        attempts: int,
        patience: Patience,
        report: Callable[[Reply], None],
    ) -> None:
        self.asker, self.store, self.attempts = asker, store, attempts
        self.patience, self.report = patience, report
        self.counts: Counter[str] = Counter(asked=0, answered=0, unanswered=0, attempts_failed=0)
        self.failed_in_a_row = 0
        self.stop: str | None = None

    async def work(self, waiting: Iterator[tuple[str, Body]]) -> None:
        while self.stop is None and (question := next(waiting, None)) is not None:
            reply = await self._until_answered(*question)
            if reply is not None and reply.outcome == "answered":
                self.counts["answered"] += 1
                self.failed_in_a_row = 0
                continue
            self.counts["unanswered"] += 1
            self.failed_in_a_row += 1
            if reply is not None and self.failed_in_a_row >= GIVE_UP_AFTER and self.stop is None:
                self.stop = f"{GIVE_UP_AFTER} questions in a row got no answer from {self.asker.judge} ({reply.error})."

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
                self.patience.is_back()
            elif self.patience.pause_while_away():
                self.counts["waits_while_away"] += 1
                self.report(reply)
                continue
            self.store.append(key, body, reply)
            self.report(reply)
            if reply.outcome == "answered":
                break
            self.counts["attempts_failed"] += 1
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
