"""What keeps a study private: tokens, forged requests, response headers, the size of what is accepted."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 64 * 1024
MAX_FIELDS = 32
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not "no-referrer": browsers would then send `Origin: null` with forms, and the origin could not be checked.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "x-robots-tag": "noindex, nofollow",
}


def new_token() -> str:
    """A private token: 256 random bits, safe in a URL."""
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """What is stored instead of a token. SHA-256 without salt is enough: the token is random, not a password."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def same_token(token: str, token_hash: str) -> bool:
    """Whether `token` has this hash, in constant time."""
    return hmac.compare_digest(hash_token(token), token_hash)


def form_token(secret: str, token_hash: str) -> str:
    """The token that every form of one assessor carries."""
    return hmac.new(secret.encode(), b"form:" + token_hash.encode(), hashlib.sha256).hexdigest()


def is_forged(request: Request, fields: Mapping[str, str], expected: str) -> bool:
    """Whether a form came from another site, or without this assessor's form token (compared in constant time)."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin")
    if site not in ("same-origin", "none"):
        return True
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        return True
    return not hmac.compare_digest(fields.get("form_token", "").encode(), expected.encode())


async def read_form(request: Request) -> dict[str, str] | None:
    """The fields of a URL-encoded form; None where it is no such form, is cut off, or is too large."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        return None
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                return None
        return dict(parse_qsl(body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except (ClientDisconnect, UnicodeDecodeError, ValueError):
        return None


class SecurityHeaders:
    """Adds `HEADERS` to every response, and forbids caching of everything but the style sheet and the script."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        caching = "private, max-age=3600" if scope["path"].startswith("/static/") else "no-store"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers["cache-control"] = caching
            await send(message)

        await self.app(scope, receive, send_with_headers)


def wants_json(headers: Headers) -> bool:
    """Whether the page's script asks (it cannot follow a redirect by itself), not the browser's form."""
    return "application/json" in headers.get("accept", "")
