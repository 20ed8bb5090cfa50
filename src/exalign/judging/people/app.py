"""The assessment page as a Starlette application: one private address per assessor, plain forms, a little script.

Everything works as plain HTML forms; the script adds drafts as one types, keys, and patience while the server is away.
Texts of models and people reach the page through Jinja's escaping only.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from exalign.data.record import Prompt
from exalign.judging.comparison import CRITERIA
from exalign.judging.people.security import SecurityHeaders, form_token, is_forged, read_form, wants_json
from exalign.judging.people.store import Answer, Assessor, Store
from exalign.storage import fingerprint_path

QUESTIONS = {
    "instruction": "Follows the instruction",
    "correct": "Correct",
    "fluent": "Fluent",
    "safe": "Safe",
    "helpful": "Helpful",
}
CHOICES = ("left", "tie", "right")
MAX_COMMENT = 10_000
MAX_POSITION = 2**31 - 1
_STATIC = str(files("exalign.judging.people") / "static")
_DIALOGUE = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_MESSAGES = {
    400: "This request could not be read.",
    403: "This form is out of date. Open your private link again.",
    404: "There is nothing here.",
    503: "The study cannot be reached just now. Nothing that was saved is lost; try again in a moment.",
}


def create_app(store: Store, *, allowed_hosts: list[str]) -> ASGIApp:
    """The application for every study in `store`. Requests for other host names than these are refused."""
    pages = Environment(
        loader=PackageLoader("exalign.judging.people"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.globals["version"] = fingerprint_path(files("exalign.judging.people") / "static")  # type: ignore[arg-type]
    app = Starlette(
        routes=[
            Route("/a/{token}", _private(_start)),
            Route("/a/{token}/done", _private(_done)),
            Route("/a/{token}/{position:int}", _private(_show)),
            Route("/a/{token}/{position:int}", _private(_submit), methods=["POST"]),
            Route("/a/{token}/{position:int}/draft", _private(_draft), methods=["POST"]),
            Route("/a/{token}/{position:int}/undo", _private(_undo), methods=["POST"]),
            Mount("/static", StaticFiles(directory=_STATIC)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)],
        exception_handlers={HTTPException: _failed, SQLAlchemyError: _failed},
    )
    app.state.store, app.state.pages = store, pages
    return SecurityHeaders(app)


def turns(prompt: Prompt) -> list[tuple[str, str]]:
    """A prompt as the turns of a chat: (role, text). Plain text is one turn without a role, unless it is a dialogue
    marked by `Human:` and `Assistant:` paragraphs.

    >>> turns("\\n\\nHuman: Hi\\n\\nAssistant: Hello.\\n\\nHuman: Bye\\n\\nAssistant:")
    [('user', 'Hi'), ('assistant', 'Hello.'), ('user', 'Bye')]
    """
    if not isinstance(prompt, str):
        return [(message["role"], message["content"]) for message in prompt]
    before, *parts = _DIALOGUE.split(prompt)
    if not parts or before.strip():
        return [("", prompt)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [(roles[role], text) for role, text in zip(parts[::2], parts[1::2], strict=True) if text.strip()]


def read_answer(fields: Mapping[str, str], *, finished: bool) -> Answer | None:
    """What a form says; None where a value is not one that the page offers, or `finished` has no overall verdict."""
    criteria = {name: fields[name] for name in CRITERIA if fields.get(name)}
    verdict, comment = fields.get("verdict") or None, fields.get("comment", "").replace("\r\n", "\n")
    if any(choice not in CHOICES for choice in criteria.values()) or verdict not in (*CHOICES, None):
        return None
    if (finished and verdict is None) or len(comment) > MAX_COMMENT:
        return None
    return {"verdict": verdict, "criteria": criteria, "comment": comment}


Page = Callable[[Request, Assessor, str, Mapping[str, str]], Awaitable[Response]]


def _private(page: Page) -> Callable[[Request], Awaitable[Response]]:
    """The page for the holder of the token in its address; for a form, after checking that it is the holder's own."""

    async def endpoint(request: Request) -> Response:
        """Answers 404 to a wrong token, 400 to what is no form of ours, 403 to a form from elsewhere."""
        store: Store = request.app.state.store
        assessor = await run_in_threadpool(store.assessor, request.path_params["token"])
        if assessor is None or request.path_params.get("position", 1) > MAX_POSITION:
            raise HTTPException(404)
        expected = form_token(assessor.secret, assessor.token_hash)
        if request.method != "POST":
            return await page(request, assessor, expected, {})
        fields = await read_form(request)
        if fields is None or not re.fullmatch(r"[0-9]{1,9}", fields.get("revision", "")):
            raise HTTPException(400)
        if is_forged(request, fields, expected):
            raise HTTPException(403)
        return await page(request, assessor, expected, fields)

    return endpoint


async def _start(request: Request, assessor: Assessor, expected: str, fields: Mapping[str, str]) -> Response:
    return RedirectResponse(await _next_address(request, assessor), 303)


async def _done(request: Request, assessor: Assessor, expected: str, fields: Mapping[str, str]) -> Response:
    store: Store = request.app.state.store
    done, total = await run_in_threadpool(store.progress, assessor.id)
    last = await run_in_threadpool(store.last_decided, assessor.id)
    here: dict[str, Any] = {"study": assessor.study, "base": _base(request), "form_token": expected, "previous": last}
    return _page(request, "done.html", done=done, total=total, **here)


async def _show(request: Request, assessor: Assessor, expected: str, fields: Mapping[str, str]) -> Response:
    store: Store = request.app.state.store
    task = await run_in_threadpool(store.task, assessor.id, request.path_params["position"])
    if task is None:
        raise HTTPException(404)
    return _page(
        request,
        "task.html",
        study=assessor.study,
        task=task,
        turns=turns(task.prompt),
        given=task.draft or task.answer or {"verdict": None, "criteria": {}, "comment": ""},
        questions=QUESTIONS,
        base=_base(request),
        form_token=expected,
        previous=task.previous,
        done=task.done,
        total=task.total,
        conflict="conflict" in request.query_params,
        max_comment=MAX_COMMENT,
    )


async def _submit(request: Request, assessor: Assessor, expected: str, fields: Mapping[str, str]) -> Response:
    store: Store = request.app.state.store
    position, answer = request.path_params["position"], read_answer(fields, finished=True)
    if answer is None:
        raise HTTPException(400)
    outcome = await run_in_threadpool(store.submit, assessor.id, position, int(fields["revision"]), answer)
    if outcome == "absent":
        raise HTTPException(404)
    if outcome == "conflict":
        return _go(request, f"{_base(request)}/{position}?conflict")
    return _go(request, await _next_address(request, assessor, after=position))


async def _draft(request: Request, assessor: Assessor, expected: str, fields: Mapping[str, str]) -> Response:
    store: Store = request.app.state.store
    position, draft = request.path_params["position"], read_answer(fields, finished=False)
    if draft is None:
        raise HTTPException(400)
    kept = await run_in_threadpool(store.save_draft, assessor.id, position, int(fields["revision"]), draft)
    return Response(status_code=204 if kept else 409)


async def _undo(request: Request, assessor: Assessor, expected: str, fields: Mapping[str, str]) -> Response:
    store: Store = request.app.state.store
    position = request.path_params["position"]
    await run_in_threadpool(store.undo, assessor.id, position, int(fields["revision"]))
    return _go(request, f"{_base(request)}/{position}")


async def _next_address(request: Request, assessor: Assessor, after: int = 0) -> str:
    store: Store = request.app.state.store
    position = await run_in_threadpool(store.next_open, assessor.id, after)
    return f"{_base(request)}/{'done' if position is None else position}"


def _base(request: Request) -> str:
    return f"/a/{request.path_params['token']}"


def _go(request: Request, address: str) -> Response:
    return JSONResponse({"next": address}) if wants_json(request.headers) else RedirectResponse(address, 303)


def _page(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    text = request.app.state.pages.get_template(template).render(**values)
    # A lone surrogate, which a record may hold, is not UTF-8: it is shown as a question mark.
    return HTMLResponse(text.encode("utf-8", "replace"), status)


async def _failed(request: Request, error: Exception) -> Response:
    """One plain page for every failure: it tells nothing about what exists and what does not."""
    status = error.status_code if isinstance(error, HTTPException) else 503
    return _page(request, "message.html", status, message=_MESSAGES.get(status, _MESSAGES[404]))
