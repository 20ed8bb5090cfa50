"""`exalign assess`: make a study for people, show it to them on a web page, and read out what they said.

The page is a Starlette application: one private address per assessor, plain forms, a little script. Everything works as
plain HTML forms; the script adds drafts as one types, keys, and patience while the server is away. Texts of models and
people reach the page through Jinja's escaping only.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

import typer
import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exalign.data.record import Prompt, spoken
from exalign.errors import InputError
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Interval
from exalign.judging.agreement import OVERALL, agreement, tally
from exalign.judging.askers import is_loopback
from exalign.judging.comparisons import CRITERIA, QUESTIONS, Comparison, write_comparisons
from exalign.judging.options import with_settings
from exalign.judging.study import Answer, Assessor, Store, parse_matches, plan_study
from exalign.settings import Settings
from exalign.storage import fingerprint_path
from exalign.terminal import escape_controls, shown

CHOICES = ("left", "tie", "right")
MAX_COMMENT = 10_000
MAX_POSITION = 2**31 - 1
_STATIC = str(files("exalign.judging") / "static")
_DIALOGUE = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_MESSAGES = {
    400: "This request could not be read.",
    403: "This form is out of date. Open your private link again.",
    404: "There is nothing here.",
    503: "The study cannot be reached just now. Nothing that was saved is lost; try again in a moment.",
}
MAX_BODY = 10 * MAX_COMMENT  # a character takes up to 9 bytes in a form
MAX_FIELDS = 32
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src "
    "'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not "no-referrer": browsers would then send `Origin: null` with forms, and the origin could not be checked.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "x-robots-tag": "noindex, nofollow",
}

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Judge by people: a blind study on a web page.")
Where = Annotated[
    str, typer.Argument(help="A run folder (its assessment/study.sqlite), an SQLite file, or a database URL.")
]
Named = Annotated[str | None, typer.Option("--name", help="Which study of the store; needed where it holds several.")]
DEFAULT_PORT = 8765
LOOPBACK = f"http://127.0.0.1:{DEFAULT_PORT}"


class StudySettings(Settings):
    """What can be set about a study; every field is an option of `exalign assess new` of the same name."""

    prompts: int | None = Field(
        None, ge=1, description="Prompts, the same for every match-up; default: 100, or all where there are fewer."
    )
    per_item: int | None = Field(
        None, ge=1, description="Judgements per comparison; by default everybody judges everything."
    )
    name: str = Field("study", description="Name of the study, shown to assessors.")
    seed: int = Field(0, description="Chooses prompts, sides and orders.")


@app.command("new")
@with_settings(StudySettings)
def new_study(
    run: Annotated[Path, typer.Argument(help="The run folder with evaluation samples.")],
    match: Annotated[
        str, typer.Option(help="Match-ups FIRST:SECOND,…: method, METHOD@STEP, sft, best-of-N, reference.")
    ],
    settings: StudySettings,
    assessors: Annotated[str, typer.Option(help="How many people, or their names separated by commas.")] = "3",
    store: Annotated[str | None, typer.Option(help="SQLite file or database URL instead of the run's own.")] = None,
    url: Annotated[str, typer.Option(help="The address by which assessors reach the page.")] = LOOPBACK,
) -> None:
    """Make a study and print each assessor's private link, once: only hashes of the tokens are stored."""
    study = plan_study(
        run,
        parse_matches(match),
        name=settings.name,
        num_prompts=settings.prompts,
        assessors=_names(assessors),
        per_item=settings.per_item,
        seed=settings.seed,
    )
    place = Store(store or str(RunFolder(run).studies))
    tokens = place.create(study)
    typer.echo(f"{len(study.items)} comparisons, {len(study.assignments)} assignments in {place.location}.")
    for key, count in study.counts.items():
        typer.echo(f"  {key}: {count}")
    typer.echo("Private links, shown only now:")
    for person, token in tokens.items():
        typer.echo(f"  {escape_controls(person)}  {_link(url, token)}")


@app.command("link")
def renew_link(
    where: Where,
    assessor: Annotated[str, typer.Argument(help="Name of the assessor.")],
    name: Named = None,
    url: Annotated[str, typer.Option(help="The address by which assessors reach the page.")] = LOOPBACK,
) -> None:
    """Print a new private link for an assessor; the old one stops working."""
    place, study = _open(where, name)
    typer.echo(_link(url, place.renew_token(study, assessor)))


@app.command("serve")
def serve_study(
    where: Where,
    host: Annotated[str, typer.Option(help="Address to bind to; loopback unless told otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to bind to.")] = DEFAULT_PORT,
    url: Annotated[
        str | None, typer.Option(help="The address by which assessors reach the page, if not this machine's.")
    ] = None,
) -> None:
    """Serve the page until interrupted.

    Any address but loopback needs --url, usually that of a TLS proxy in front: requests under other host names are
    refused.
    """
    place = _open_store(where)
    place.check()
    pages = create_app(place, allowed_hosts=allowed_hosts(host, url))
    typer.echo(f"Serving {place.location} on http://{host}:{port} (Ctrl+C ends it; nothing is lost).")
    # Addresses hold the tokens, so they are not logged. A person reads for longer than uvicorn's 5 s; a form sent on a
    # connection closed just then would be lost.
    quiet: dict[str, Any] = {"access_log": False, "log_level": "warning", "server_header": False}
    config = uvicorn.Config(pages, host=host, port=port, proxy_headers=False, timeout_keep_alive=120, **quiet)
    try:
        uvicorn.Server(config).run()
    except SystemExit:
        raise InputError(f"Cannot listen on {host}:{port}; is it taken? Choose another --port.") from None


@app.command("export")
def export_study(
    where: Where,
    output: Annotated[Path, typer.Option(help="The file of comparisons to write (JSON Lines).")],
    name: Named = None,
) -> None:
    """Write every verdict as a comparison record."""
    place, study = _open(where, name)
    comparisons = place.comparisons(study)
    write_comparisons(output, comparisons)
    typer.echo(f"{len(comparisons)} comparisons in {output}.")
    _print_standing(place, study)


@app.command("agreement")
def study_agreement(where: Where, name: Named = None) -> None:
    """Print win, tie and lose per match-up, and how far the assessors agree, overall and per criterion."""
    place, study = _open(where, name)
    comparisons = place.comparisons(study)
    _print_standing(place, study)
    if not comparisons:
        raise InputError(f"Study {study} has no verdicts yet.")
    console = Console()
    console.print(_tally_table(comparisons))
    console.print(_agreement_table(comparisons))


def _tally_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table("match-up", "criterion", "win %", "tie %", "lose %", "win + tie/2 %", "verdicts")
    for criterion in (OVERALL, *CRITERIA):
        for row in tally(comparisons, criterion):
            shares = map(_share, (row.win, row.tie, row.lose, row.score))
            table.add_row(shown(f"{row.first} : {row.second}"), criterion, *shares, str(row.num_judgements))
    return table


def _agreement_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table("criterion", "Krippendorff's alpha", "equal pairs %", "without ties %", "items", "assessors")
    for criterion in (OVERALL, *CRITERIA):
        found = agreement(comparisons, criterion)
        shares = map(_share, (found.pairwise, found.without_ties))
        table.add_row(criterion, _number(found.alpha), *shares, str(found.num_items), str(found.num_assessors))
    return table


def _share(value: Interval | None) -> str:
    return _number(value, 100, 1)


def _number(value: Interval | None, scale: float = 1, digits: int = 3) -> str:
    if value is None:
        return "–"
    found = [f"{x * scale:.{digits}f}" for x in (value.estimate, value.low, value.high) if x is not None]
    return found[0] if len(found) < 3 else f"{found[0]} [{found[1]}, {found[2]}]"


def _print_standing(place: Store, study: str) -> None:
    for person, (done, total) in place.standing(study).items():
        typer.echo(f"  {escape_controls(person)}: {done} of {total}")


def _link(url: str, token: str) -> str:
    return f"{url.rstrip('/')}/a/{token}"


def _names(text: str) -> list[str]:
    if text.strip().isdecimal():
        if not 1 <= int(text) <= 1000:
            raise InputError(f"--assessors {text}: between 1 and 1000 people, please.")
        return [f"assessor-{i}" for i in range(1, int(text) + 1)]
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"--assessors {text!r}: give a number, or names separated by commas.")
    return names


def _open_store(where: str) -> Store:
    if "://" not in where:
        path = RunFolder(Path(where)).studies if Path(where).is_dir() else Path(where)
        if not path.is_file():
            raise InputError(f"{path} does not exist; make a study with `exalign assess new`.")
        where = str(path)
    return Store(where)


def _open(where: str, name: str | None) -> tuple[Store, str]:
    place = _open_store(where)
    studies = place.check()
    if name is None and len(studies) == 1:
        return place, studies[0]
    if name not in studies:
        asked = "say which with --name" if name is None else f"{name} is not one of them"
        raise InputError(f"{place.location} holds the studies {', '.join(studies)}; {asked}.")
    return place, name


def allowed_hosts(host: str, url: str | None) -> list[str]:
    """The host names under which requests are answered.

    >>> allowed_hosts("127.0.0.1", None)
    ['127.0.0.1', 'localhost']
    """
    if ":" in host:
        raise InputError(f"--host {host}: give an IPv4 address or a host name.")
    try:
        named = urlsplit(url).hostname if url else None
    except ValueError:
        named = None
    if url is not None and named is None:
        raise InputError(f"--url {url} has no host name (for example https://assess.example.org).")
    if not is_loopback(host) and named is None:
        raise InputError(f"{host} is open to others: say by which --url assessors reach it (behind TLS).")
    return list(dict.fromkeys(["127.0.0.1", "localhost", *([named] if named else [])]))


def create_app(store: Store, *, allowed_hosts: list[str]) -> Starlette:
    """The application for every study in `store`. Requests for other host names than these are refused."""
    pages = Environment(
        loader=PackageLoader("exalign.judging"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.globals["version"] = fingerprint_path(files("exalign.judging") / "static")  # type: ignore[arg-type]
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
        middleware=[Middleware(_secured), Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)],
        exception_handlers={HTTPException: _failed, SQLAlchemyError: _failed},
    )
    app.state.store, app.state.pages = store, pages
    return app


def turns(prompt: Prompt) -> list[tuple[str, str]]:
    """A prompt as the turns of a chat: (role, text). Plain text is one turn without a role, unless it is a dialogue
    marked by `Human:` and `Assistant:` paragraphs.

    >>> turns("\\n\\nHuman: Hi\\n\\nAssistant: Hello.\\n\\nHuman: Bye\\n\\nAssistant:")
    [('user', 'Hi'), ('assistant', 'Hello.'), ('user', 'Bye')]
    """
    if not isinstance(prompt, str):
        return [(message["role"], spoken(message)) for message in prompt]
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


@dataclass(frozen=True)
class _Visit:
    """A request of an assessor, with the fields of the form that was sent; its pages run in a thread."""

    request: Request
    assessor: Assessor
    form_token: str
    fields: Mapping[str, str]

    @property
    def store(self) -> Store:
        return self.request.app.state.store

    @property
    def position(self) -> int:
        return self.request.path_params["position"]

    @property
    def base(self) -> str:
        return f"/a/{self.request.path_params['token']}"

    @property
    def seen(self) -> tuple[int, int, int]:
        """Which assignment the form is of, as which of its revisions the page showed it."""
        return self.assessor.id, self.position, int(self.fields["revision"])

    def answer(self, *, finished: bool) -> Answer:
        answer = read_answer(self.fields, finished=finished)
        if answer is None:
            raise HTTPException(400)
        return answer

    def page(self, template: str, **values: Any) -> Response:
        done, total = self.store.progress(self.assessor.id)
        values |= {"study": self.assessor.study, "base": self.base, "form_token": self.form_token}
        values |= {"done": done, "total": total, "previous": self.store.last_decided(self.assessor.id)}
        return _page(self.request, template, **values)

    def go_to(self, place: int | str | None) -> Response:
        address = f"{self.base}/{'done' if place is None else place}"
        by_script = "application/json" in self.request.headers.get("accept", "")  # cannot follow a redirect by itself
        return JSONResponse({"next": address}) if by_script else RedirectResponse(address, 303)


def _private(page: Callable[[_Visit], Response]) -> Callable[[Request], Awaitable[Response]]:
    """The page for the holder of the token in its address; for a form, after checking that it is the holder's own."""

    async def endpoint(request: Request) -> Response:
        """Answers 404 to a wrong token, 400 to what is no form of ours, 403 to a form from elsewhere."""
        store: Store = request.app.state.store
        assessor = await run_in_threadpool(store.assessor, request.path_params["token"])
        if assessor is None or request.path_params.get("position", 1) > MAX_POSITION:
            raise HTTPException(404)
        expected = form_token(assessor.secret, assessor.token_hash)
        fields = await read_form(request) if request.method == "POST" else {"revision": "0", "form_token": expected}
        if fields is None or not re.fullmatch(r"[0-9]{1,9}", fields.get("revision", "")):
            raise HTTPException(400)
        if request.method == "POST" and is_forged(request, fields, expected):
            raise HTTPException(403)
        return await run_in_threadpool(page, _Visit(request, assessor, expected, fields))

    return endpoint


def _start(visit: _Visit) -> Response:
    return visit.go_to(visit.store.next_open(visit.assessor.id))


def _done(visit: _Visit) -> Response:
    return visit.page("done.html")


def _show(visit: _Visit) -> Response:
    task = visit.store.task(visit.assessor.id, visit.position)
    if task is None:
        raise HTTPException(404)
    return visit.page(
        "task.html",
        task=task,
        turns=turns(task.pair.prompt),
        given=task.draft or task.answer or {"verdict": None, "criteria": {}, "comment": ""},
        questions=QUESTIONS,
        conflict="conflict" in visit.request.query_params,
        max_comment=MAX_COMMENT,
    )


def _submit(visit: _Visit) -> Response:
    outcome = visit.store.submit(*visit.seen, visit.answer(finished=True))
    if outcome == "absent":
        raise HTTPException(404)
    if outcome == "conflict":
        return visit.go_to(f"{visit.position}?conflict")
    return visit.go_to(visit.store.next_open(visit.assessor.id, visit.position))


def _draft(visit: _Visit) -> Response:
    kept = visit.store.save_draft(*visit.seen, visit.answer(finished=False))
    return Response(status_code=204 if kept else 409)


def _undo(visit: _Visit) -> Response:
    visit.store.undo(*visit.seen)
    return visit.go_to(visit.position)


def _page(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    text = request.app.state.pages.get_template(template).render(**values)
    # A lone surrogate, which a record may hold, is not UTF-8: it is shown as a question mark.
    return HTMLResponse(text.encode("utf-8", "replace"), status)


async def _failed(request: Request, error: Exception) -> Response:
    """One plain page for every failure: it tells nothing about what exists and what does not."""
    status = error.status_code if isinstance(error, HTTPException) else 503
    return _page(request, "message.html", status, message=_MESSAGES.get(status, _MESSAGES[404]))


def form_token(secret: str, token_hash: str) -> str:
    """The token that every form of one assessor carries."""
    return hmac.new(secret.encode(), b"form:" + token_hash.encode(), hashlib.sha256).hexdigest()


def is_forged(request: Request, fields: Mapping[str, str], expected: str) -> bool:
    """Whether a form came from another site, or without this assessor's form token (compared in constant time)."""
    origin = request.headers.get("origin")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
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


def _secured(app: ASGIApp) -> ASGIApp:
    """Adds `HEADERS` to every response, and forbids caching of everything but the style sheet and the script."""

    async def secured(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                caching = "private, max-age=3600" if scope["path"].startswith("/static/") else "no-store"
                MutableHeaders(scope=message).update({**HEADERS, "cache-control": caching})
            await send(message)

        await app(scope, receive, send_with_headers)

    return secured
