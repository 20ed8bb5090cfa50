"""A judge behind an OpenAI-compatible endpoint: one attempt at one request, and what its outcome means."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from exalign.errors import InputError
from exalign.judging.llm.exchanges import Body, Reply, parse_completion
from exalign.judging.llm.settings import JudgeSettings
from exalign.redaction import redact

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_FATAL = {401: "the key is refused", 402: "the account has no credit", 404: "the address or the model is unknown"}
_AGAIN = (408, 409, 425, 429)
_STORED_CHARACTERS = 20_000
"""Of the body of a failed attempt, which may be any page of any proxy; answers are stored whole."""


class Asker(Protocol):
    """Who is asked: `body` makes the request for a question, `attempt` puts it once and never raises for a failure."""

    judge: str
    concurrency: int

    def body(self, question: str) -> Body: ...

    async def attempt(self, body: Body) -> Reply: ...

    async def close(self) -> None: ...


class Endpoint:
    """The model `judge` at `url` (ending in `/v1` as a rule), asked through the official client.

    The key is read from the environment variable `settings.key_variable` and goes nowhere but into the request's
    header: it is never stored or printed, and should a server repeat it, it is blotted out. It is not sent unencrypted
    over a network unless the variable was named by the user.
    """

    def __init__(self, url: str, judge: str, settings: JudgeSettings) -> None:
        self.judge = judge
        self.concurrency = settings.concurrency
        self._settings = settings
        self._url = _checked(url)
        self._key = os.environ.get(settings.key_variable, "").strip()
        self._spelled = spellings(self._key)
        if self._key and self._key in json.dumps(settings.request_fields, ensure_ascii=False):
            raise InputError(
                f"--request-fields holds the key of {settings.key_variable}: it would be stored with every request, "
                "and is sent in the header anyway; remove it."
            )
        default = JudgeSettings.model_fields["key_variable"].default
        if self._key and settings.key_variable == default and not _is_private(url):
            raise InputError(
                f"{self._url} is not encrypted, and the key in {default} would be readable on the way: use https, or "
                "name with --key-variable the variable whose key may be sent there."
            )
        self._client: AsyncOpenAI | None = None

    def body(self, question: str) -> Body:
        """The request for a question; fields given as null in `request_fields` are left out."""
        fields: Body = {
            "model": self.judge,
            "messages": [{"role": "user", "content": question}],
            "temperature": self._settings.temperature,
            "max_tokens": self._settings.max_answer_tokens,
            **self._settings.request_fields,
        }
        return {name: value for name, value in fields.items() if value is not None}

    async def attempt(self, body: Body) -> Reply:
        """Send the request once. `timeout` bounds the whole attempt, also against a server that trickles."""
        from openai import APIConnectionError, APIStatusError, Omit, OpenAIError

        start = time.monotonic()
        raw: str | None = None
        status: int | None = None
        retry_after = None
        try:
            async with asyncio.timeout(self._settings.timeout):
                response = await self._open_client().chat.completions.with_raw_response.create(
                    model=body["model"],
                    messages=body["messages"],
                    extra_headers=None if self._key else {"Authorization": Omit()},
                    extra_body={name: value for name, value in body.items() if name not in ("model", "messages")},
                )
            raw, status = response.text, response.status_code
            complete = parse_completion(raw) is not None
            outcome, error = ("answered", None) if complete else ("again", "the answer is not a chat completion")
        except TimeoutError:
            outcome, error = "again", f"no answer within {self._settings.timeout:g} s"
        except APIStatusError as problem:
            raw, status = problem.response.text, problem.status_code
            retry_after = seconds_to_wait(problem.response.headers)
            outcome, error = self._meaning(status, self._blot(problem.message, 300) or "")
        except APIConnectionError as problem:
            cause = problem.__cause__ or problem
            outcome = "away" if type(cause).__name__ == "ConnectError" else "again"
            error = f"{problem.message.rstrip('.')} ({type(cause).__name__}: {cause})"
        except OpenAIError as problem:
            outcome, error = "again", f"{type(problem).__name__}: {problem}"
        seconds = time.monotonic() - start
        limit = None if outcome == "answered" else _STORED_CHARACTERS
        return Reply(
            outcome, self._blot(raw, limit), status, redact(self._blot(error) or "") or None, retry_after, seconds
        )

    async def close(self) -> None:
        # The next match-up is asked in another event loop, with a client of its own.
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    def _open_client(self) -> AsyncOpenAI:
        if self._client is None:
            try:
                from openai import AsyncOpenAI
            except ImportError:
                raise InputError(
                    "Judging through an endpoint needs the openai client: pip install 'exalign[judge]'."
                ) from None
            # Retries are ours: the client would not repeat a malformed answer, nor keep the failed ones.
            self._client = AsyncOpenAI(
                base_url=self._url,
                api_key=self._key or "none",
                timeout=self._settings.timeout,
                max_retries=0,
            )
        return self._client

    def _meaning(self, status: int, message: str) -> tuple[str, str]:
        if status in _FATAL:
            where = f" (read from {self._settings.key_variable})" if self._key else " (none is set)"
            hint = f"{_FATAL[status]}{where if status == 401 else ''}"
            return "fatal", f"HTTP {status} from {self._url}: {hint}: {message}"
        return "again" if status in _AGAIN or status >= 500 else "refused", f"HTTP {status}: {message}"

    def _blot(self, text: str | None, limit: int | None = None) -> str | None:
        """The text without the key, then cut: a cut first could leave a part of the key at its end."""
        return self._spelled.sub("[key]", text)[:limit] if text and self._key else text and text[:limit]


def spellings(key: str) -> re.Pattern[str]:
    r"""What finds a key in a text, also where a server spells some of its characters as JSON escapes.

    >>> [bool(spellings("a/b").search(text)) for text in ('"a/b"', r'"a\/b"', r'"\u0061/b"', '"ab"')]
    [True, True, True, False]
    """
    hexes = (f"{ord(c):04x}" for c in key)
    return re.compile("".join(rf"(?:\\?{re.escape(c)}|\\u(?i:{h}))" for c, h in zip(key, hexes, strict=True)))


def seconds_to_wait(headers: Any, *, now: datetime | None = None) -> float | None:
    """What `Retry-After` asks for (seconds, or a date), None where it is absent or not readable.

    >>> seconds_to_wait({"retry-after": "7"}), seconds_to_wait({}), seconds_to_wait({"retry-after": "soon"})
    (7.0, None, None)
    """
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
        return seconds if 0 <= seconds < float("inf") else None
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise InputError(f"--endpoint {url}: not a web address, for example https://api.openai.com/v1.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError("--endpoint must not carry a user, password or query: put the key into the environment.")
    return url


def _is_private(url: str) -> bool:
    """Nobody on the way can read what is sent: encrypted, or this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False
