"""Real HTTP servers for the judge's tests, run by uvicorn in processes of their own.

`rules` is a chat-completions server whose model name is the rule by which it judges, so that every number can be
derived by hand. `faults` stands in front of any such server and spoils the first attempts at each question.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections import Counter

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

FAULTS = ("429", "429-bare", "500", "503-html", "slow", "cut-off", "malformed", "wrong-shape", "hang-up")

SILENT = {
    "thinks-on": ({"content": None, "reasoning_content": "Let me think about A and B"}, "length"),
    "cut-off": ({"content": "Verdict: A"}, "length"),
    "refuses": ({"content": None, "refusal": "I would rather not compare these."}, "stop"),
    "filtered": ({"content": "Verdict: A"}, "content_filter"),
    "brackets": ({"content": "A is better. [[A]]"}, "stop"),
    "parts": ({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Verdict: A"}]}, "stop"),
}
"""Models that say the same to every question: the message, and why it ended there."""


def verdict_by_rule(rule: str, a: str, b: str) -> str:
    """What the judge named `rule` answers about two texts."""
    if rule == "always-a":
        return "Both will do.\nVerdict: A"
    if rule == "mumbles":
        return "I would rather not say."
    if rule == "half-character":
        return "No idea \ud800"
    if rule == "half-mute":
        return "Verdict: A" if "good" in a else "who knows"
    score = {"longer": len, "good": lambda text: text.count("good")}[rule.removeprefix("slow-")]
    winner = "tie" if score(a) == score(b) else ("A" if score(a) > score(b) else "B")
    return f"One has more of it.\n**Verdict: {winner}**"


def rules() -> Starlette:
    """Rules as models. `GET /counts` says how often each question was answered, and which keys were seen."""
    served: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    delay = float(os.environ.get("DELAY", "0"))

    async def complete(request: Request) -> Response:
        body = await request.json()
        keys[request.headers.get("authorization", "none")] += 1
        question = body["messages"][0]["content"]
        answers = re.findall(r"<(?:answer|summary|message)_([ab])>\n(.*?)\n?</", question, flags=re.S)
        if body["model"] == "key-echo":
            return JSONResponse({"error": {"message": f"bad {request.headers['authorization']}"}}, status_code=401)
        if "too-long" in question:
            return JSONResponse({"error": {"message": "too many tokens"}}, status_code=400)
        await asyncio.sleep(delay)
        served[question] += 1
        message, reason = SILENT.get(body["model"], ({}, "stop"))
        content = "" if message else verdict_by_rule(body["model"], answers[0][1], answers[1][1])
        message = {"role": "assistant", "content": content, **message}
        usage = {"prompt_tokens": len(question), "completion_tokens": len(content), "total_tokens": 0}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        answer = {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}
        return Response(json.dumps(answer), media_type="application/json")  # which can spell half a character

    async def counts(request: Request) -> Response:
        return JSONResponse({"served": list(served.values()), "keys": dict(keys)})

    return Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"]), Route("/counts", counts)])


def faults() -> Starlette:
    """A proxy to `UPSTREAM`: two attempts at each question fail, in ways chosen by its content; the third passes."""
    upstream, slow = os.environ["UPSTREAM"], float(os.environ.get("SLOW", "1.5"))
    attempts: Counter[str] = Counter()
    injected: Counter[str] = Counter()
    client = httpx.AsyncClient(timeout=60)

    async def spoil(fault: str) -> Response:
        good = json.dumps({"choices": [{"message": {"content": "Verdict: A"}}], "usage": None})
        match fault:
            case "429":
                return JSONResponse(
                    {"error": {"message": "slow down"}}, status_code=429, headers={"retry-after": "0.2"}
                )
            case "429-bare":
                return JSONResponse({"error": "slow down"}, status_code=429)
            case "500":
                return JSONResponse({"error": {"message": "overloaded"}}, status_code=500)
            case "503-html":
                return PlainTextResponse("<html>Service Unavailable</html>", status_code=503)
            case "slow":
                await asyncio.sleep(slow)
                return PlainTextResponse(good)
            case "cut-off":  # half of the announced body, then the connection closes
                half = good[: len(good) // 2]
                return Response(half, media_type="application/json", headers={"content-length": str(len(good))})
            case "malformed":
                return Response(good[:-5], media_type="application/json")
            case "wrong-shape":
                return JSONResponse({"choices": []})
        raise ConnectionError("hang up")

    async def forward(request: Request) -> Response:
        body = await request.body()
        digest = hashlib.sha256(body).hexdigest()
        attempts[digest] += 1
        if attempts[digest] <= 2:
            fault = FAULTS[(int(digest[:8], 16) + attempts[digest]) % len(FAULTS)]
            injected[fault] += 1
            return await spoil(fault)
        answer = await client.post(
            upstream + request.url.path, content=body, headers={"content-type": "application/json"}
        )
        return Response(answer.content, status_code=answer.status_code, media_type="application/json")

    async def counts(request: Request) -> Response:
        return JSONResponse({"attempts": list(attempts.values()), "injected": dict(injected)})

    return Starlette(routes=[Route("/v1/chat/completions", forward, methods=["POST"]), Route("/counts", counts)])
