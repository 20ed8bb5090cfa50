"""Who is asked: a model behind an OpenAI-compatible endpoint, or one in this process. One attempt at one request, and
what its outcome means."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import SplitResult, urlsplit

from pydantic import Field

from exalign.device import device
from exalign.errors import InputError
from exalign.judging.exchanges import Body, Reply, parse_completion, request_key
from exalign.models.model_settings import adapter_base
from exalign.redaction import redact
from exalign.settings import Settings
from exalign.storage import fingerprint_path

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_FATAL = {
    401: "the key is refused",
    402: "the account has no credit",
    404: "the address or the model is unknown",
    405: "nobody takes questions at this address",
}
_AGAIN = (408, 409, 425, 429)
_STORED_CHARACTERS = 20_000
"""Of the body of a failed attempt, which may be any page of any proxy; answers are stored whole."""


class JudgeSettings(Settings):
    """How a language model is asked to compare answers; every field is an option of `exalign judge`."""

    template: str = Field(
        "instruction", description="Wording of the question: dialogue, instruction, summarisation, or a Jinja file."
    )
    prompts: int = Field(100, ge=1, description="At most this many prompts of each match-up are judged.")
    seed: int = Field(0, ge=0, description="Chooses the prompts; of one seed, fewer prompts are a subset of more.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of the judge; 0 is greedy.")
    max_answer_tokens: int = Field(256, ge=1, description="Longest answer of the judge, in tokens.")
    request_fields: dict[str, Any] = Field(
        default_factory=dict,
        description="JSON object merged into each request to an endpoint; null removes a field, such as max_tokens.",
    )
    concurrency: int = Field(8, ge=1, description="Requests to an endpoint under way at the same time.")
    timeout: float = Field(120.0, gt=0, description="Seconds after which an unanswered request is tried again.")
    attempts: int = Field(6, ge=1, description="How often one question is tried before it is left for the next run.")
    retry_wait: float = Field(
        1.0, gt=0, description="Seconds before the second attempt; doubles with each further one, up to a minute."
    )
    away_wait: float = Field(
        1800.0,
        ge=0,
        description="Seconds to wait, over and over, for an endpoint where nobody answers; that counts as no attempt.",
    )
    key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the endpoint's key; unset means no key is sent."
    )


class Asker(Protocol):
    """Who is asked: `body` makes the request for a question, `attempt` puts it once and never raises for a failure."""

    judge: str
    concurrency: int

    def body(self, question: str) -> Body: ...

    async def attempt(self, body: Body) -> Reply: ...

    async def close(self) -> None: ...


def _request(judge: str, question: str, settings: JudgeSettings) -> Body:
    messages = [{"role": "user", "content": question}]
    sampling = {"temperature": settings.temperature, "max_tokens": settings.max_answer_tokens}
    return {"model": judge, "messages": messages, **sampling}


class Endpoint:
    """The model `judge` at `url` (ending in `/v1` as a rule), asked through the official client.

    The key is read from the environment variable `settings.key_variable` and goes nowhere but into the request's
    header: it is never stored or printed, and should a server repeat it, it is blotted out. It is not sent unencrypted
    over a network unless the variable was named by the user.
    """

    def __init__(self, url: str, judge: str, settings: JudgeSettings) -> None:
        if find_spec("openai") is None:
            raise InputError("Judging through an endpoint needs the openai client: pip install 'exalign[judge]'.")
        self.judge = judge
        self.concurrency = settings.concurrency
        self._settings = settings
        self._url, parts = url, _checked(url)
        self._key = os.environ.get(settings.key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise InputError(
                f"The key in {settings.key_variable} has a line break, a space or a character that no request carries; "
                "set it again."
            )
        self._spelled = spellings(self._key)
        fields = settings.request_fields
        if "messages" in fields or fields.get("model", judge) is None:
            raise InputError("--request-fields must leave the messages and the model: they are what is asked, and who.")
        if self._key and self._spelled.search(json.dumps(fields, ensure_ascii=False)):
            raise InputError(
                f"--request-fields holds the key of {settings.key_variable}: it would be stored with every request, "
                "and is sent in the header anyway; remove it."
            )
        default = JudgeSettings.model_fields["key_variable"].default
        readable = parts.scheme != "https" and not is_loopback(parts.hostname or "")
        if self._key and settings.key_variable == default and readable:
            raise InputError(
                f"{self._url} is not encrypted, and the key in {default} would be readable on the way: use https, or "
                "name with --key-variable the variable whose key may be sent there."
            )
        self._client: AsyncOpenAI | None = None

    def body(self, question: str) -> Body:
        """The request for a question; fields given as null in `request_fields` are left out."""
        fields = {**_request(self.judge, question, self._settings), **self._settings.request_fields}
        return {name: value for name, value in fields.items() if value is not None}

    async def attempt(self, body: Body) -> Reply:
        """Send the request once. `timeout` bounds the whole attempt, also against a server that trickles."""
        from openai import APIConnectionError, APIStatusError, AsyncOpenAI, Omit, OpenAIError

        if self._client is None:
            # Retries are ours: the client would not repeat a malformed answer, nor keep the failed ones.
            key, timeout = self._key or "none", self._settings.timeout
            self._client = AsyncOpenAI(base_url=self._url, api_key=key, timeout=timeout, max_retries=0)
        start = time.monotonic()
        raw: str | None = None
        status: int | None = None
        retry_after = None
        try:
            async with asyncio.timeout(self._settings.timeout):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=body["model"],
                    messages=body["messages"],
                    extra_headers=None if self._key else {"Authorization": Omit()},
                    extra_body={name: value for name, value in body.items() if name not in ("model", "messages")},
                )
            raw, status = response.text, response.status_code
            outcome, error = "answered", None
            if parse_completion(raw) is None:
                said = self._blot(" ".join(raw.split()), 200)
                outcome, error = "again", f"the answer is not a chat completion{self._hint()}: {said}"
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
        raw = self._blot(raw, None if outcome == "answered" else _STORED_CHARACTERS)
        error = redact(self._blot(error) or "") or None
        return Reply(outcome, raw, status, error, retry_after, seconds=time.monotonic() - start)

    async def close(self) -> None:
        # The next match-up is asked in another event loop, with a client of its own.
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    def _meaning(self, status: int, message: str) -> tuple[str, str]:
        if status in _FATAL:
            where = f" (read from {self._settings.key_variable})" if self._key else " (none is set)"
            hint = where if status == 401 else self._hint() if status in (404, 405) else ""
            return "fatal", f"HTTP {status} from {self._url}: {_FATAL[status]}{hint}: {message}"
        return "again" if status in _AGAIN or status >= 500 else "refused", f"HTTP {status}: {message}"

    def _hint(self) -> str:
        url = self._url.rstrip("/")
        return "" if url.endswith("/v1") else f" (is the endpoint {url}/v1?)"

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
    value = headers.get("retry-after", "")
    with suppress(ValueError):
        seconds = float(value)
        return seconds if 0 <= seconds < float("inf") else None
    with suppress(ValueError, TypeError, OverflowError, IndexError):
        moment = parsedate_to_datetime(value)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())
    return None


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise InputError(f"--endpoint {url}: not a web address, for example https://api.openai.com/v1.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError("--endpoint must not carry a user, password or query: put the key into the environment.")
    return parts


def is_loopback(host: str) -> bool:
    """Only this machine can reach an address bound to `host`."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class LocalModel:
    """The model of a folder or hub name, in this process, one question at a time; for speed, serve it.

    Temperature 0 is greedy; else each question has its own seed.

    A folder's weights are part of the request by their content, so that answers of other weights are never reused.
    The chat template of the tokenizer is used where there is one, else the question as it is.
    """

    concurrency = 1

    def __init__(self, source: str, settings: JudgeSettings) -> None:
        if settings.request_fields:
            raise InputError("--request-fields are for requests to an --endpoint; a --model-path takes none.")
        base = adapter_base(Path(source))
        folders = [Path(name) for name in (source, base) if name and Path(name).is_dir()]
        self.judge = folders[0].resolve().name if folders else source
        self._source = source
        self._settings = settings
        self._weights = {"weights": "-".join(map(fingerprint_path, folders))} if folders else {}

    def body(self, question: str) -> Body:
        return {**_request(self.judge, question, self._settings), **self._weights}

    async def attempt(self, body: Body) -> Reply:
        """Generate one answer, in a thread."""
        return await asyncio.to_thread(self._generate, body)

    async def close(self) -> None:
        """It stays for the next match-up."""

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from exalign.models.loading import load_policy, load_tokenizer
        from exalign.models.model_settings import ModelSettings

        tokenizer = load_tokenizer(self._source)
        model: Any = load_policy(ModelSettings.model_validate({"source": self._source}), tokenizer)
        return model.to(device()).eval(), tokenizer

    def _generate(self, body: Body) -> Reply:
        import torch

        from exalign.data.tokenization import completion_text, render_chat
        from exalign.rollout.scorers import max_positions

        start, (model, tokenizer) = time.monotonic(), self._loaded
        chat, text = tokenizer.chat_template is not None, body["messages"][0]["content"]
        text = render_chat(tokenizer, body["messages"]) if chat else text
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]  # a template writes its own special tokens
        prompt_tokens = len(ids)
        room = max_positions(model)
        if room is not None and prompt_tokens >= room:
            return Reply("refused", error=f"the question has {prompt_tokens} tokens, the model reads {room}")
        temperature = body["temperature"]
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        limit = body["max_tokens"] if room is None else min(body["max_tokens"], room - prompt_tokens)
        torch.manual_seed(int(request_key(body)[:15], 16))
        with torch.inference_mode():
            asking = torch.tensor([ids], device=model.device)
            more = {"max_new_tokens": limit, "pad_token_id": tokenizer.pad_token_id, **sampling}
            output = model.generate(asking, attention_mask=torch.ones_like(asking), **more)
        answer = output[0, prompt_tokens:].tolist()
        message = {"role": "assistant", "content": completion_text(tokenizer, ids, answer)}
        finish = "length" if len(answer) >= limit else "stop"
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(answer)}
        choice = {"message": message, "finish_reason": finish}
        raw = json.dumps({"model": body["model"], "choices": [choice], "usage": usage})
        return Reply("answered", raw=raw, seconds=time.monotonic() - start)
