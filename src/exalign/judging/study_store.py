"""Where a study lives: any database that SQLAlchemy speaks to, SQLite by default.

One row per assignment holds everything its assessor does there, so there can be no second verdict for it. `revision`
counts how often the row's answer changed; a change names the revision that it saw and is one conditional UPDATE, so a
repeated request changes nothing, and a window with an old page cannot overwrite what a newer one stored.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from exalign.errors import InputError
from exalign.judging.comparisons import OTHER, Comparison, Pair, Side, verdict_from_shown
from exalign.judging.study import Study
from exalign.redaction import redact

FORMAT_VERSION = 1
METADATA = sa.MetaData()
# Texts are JSON columns: PostgreSQL's text type refuses NUL characters, which a model may well produce.
_JSON = sa.JSON(none_as_null=True)
STUDY = sa.Table(
    "study",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(200), unique=True, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("secret", sa.String(64), nullable=False),
    sa.Column("about", _JSON, nullable=False),
)
ASSESSOR = sa.Table(
    "assessor",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.ForeignKey("study.id"), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("token_hash", sa.String(64), unique=True, nullable=False),
    sa.UniqueConstraint("study_id", "name"),
)
ITEM = sa.Table(
    "item",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.ForeignKey("study.id"), nullable=False),
    sa.Column("content", _JSON, nullable=False),
)
ASSIGNMENT = sa.Table(
    "assignment",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("assessor_id", sa.ForeignKey("assessor.id"), nullable=False),
    sa.Column("item_id", sa.ForeignKey("item.id"), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("left", sa.String(6), nullable=False),
    sa.Column("revision", sa.Integer, nullable=False, default=0),
    sa.Column("opened_at", sa.String(32)),
    sa.Column("decided_at", sa.String(32)),
    sa.Column("answer", _JSON),
    sa.Column("draft", _JSON),
    sa.UniqueConstraint("assessor_id", "item_id"),
    sa.UniqueConstraint("assessor_id", "position"),
)
Answer = dict[str, Any]
"""What a person decided, as they saw it: `verdict` (left, tie, right), `criteria` {name: verdict}, `comment`."""
_ROW = ASSIGNMENT.c


@dataclass(frozen=True, slots=True)
class Assessor:
    """Who holds a token. `secret` is the study's, for form tokens."""

    id: int
    name: str
    study: str
    token_hash: str
    secret: str


@dataclass(frozen=True, slots=True)
class Task:
    """One assignment as its page needs it. `answer` is what was decided; `draft` what was entered since."""

    position: int
    revision: int
    pair: Pair
    left: Side
    answer: Answer | None
    draft: Answer | None
    total: int
    done: int
    previous: tuple[int, int] | None
    """Position and revision of the assignment decided last: what Undo takes back."""

    @property
    def left_text(self) -> str:
        """The answer shown on the left, as A."""
        return self.pair.text(self.left)

    @property
    def right_text(self) -> str:
        """The answer shown on the right, as B."""
        return self.pair.text(OTHER[self.left])


class Store:
    """A study database by URL, or by path for SQLite. Every method is a short transaction and may run in any thread."""

    def __init__(self, location: str) -> None:
        self.engine = open_engine(location)
        self.location = self.engine.url.render_as_string(hide_password=True)

    def create(self, study: Study) -> dict[str, str]:
        """Store a planned study; each assessor's token, which is stored only as a hash and cannot be had again."""
        tokens = {name: new_token() for name in study.assessors}
        with self._reachable(), self.engine.begin() as connection:
            METADATA.create_all(connection)
            if connection.scalar(sa.select(STUDY.c.id).where(STUDY.c.name == study.name)):
                raise InputError(f"{self.location} already has a study named {study.name}; choose another --name.")
            about = {"seed": study.seed, "counts": study.counts, "created": now()}
            values = {"name": study.name, "version": FORMAT_VERSION, "secret": secrets.token_hex(32), "about": about}
            study_id = _inserted(connection, STUDY, values)
            people = [
                _inserted(connection, ASSESSOR, {"study_id": study_id, "name": name, "token_hash": hash_token(token)})
                for name, token in tokens.items()
            ]
            items = [
                _inserted(connection, ITEM, {"study_id": study_id, "content": asdict(item)}) for item in study.items
            ]
            rows = [
                {"assessor_id": people[a.assessor], "item_id": items[a.item], "position": a.position, "left": a.left}
                for a in study.assignments
            ]
            connection.execute(sa.insert(ASSIGNMENT), rows)
        return tokens

    def check(self) -> list[str]:
        """The studies' names; `InputError` where there is none or one of another format."""
        with self._reachable(), self.engine.connect() as connection:
            there = sa.inspect(connection).has_table(STUDY.name)
            rows = connection.execute(sa.select(STUDY.c.name, STUDY.c.version)).all() if there else []
        if not rows:
            raise InputError(f"{self.location} holds no study; make one with `exalign assess new`.")
        for name, version in rows:
            if version != FORMAT_VERSION:
                raise InputError(f"Study {name} has format {version}; this exalign reads {FORMAT_VERSION}.")
        return [name for name, _ in rows]

    def renew_token(self, study: str, name: str) -> str:
        """A new token for an assessor whose link was lost; the old one stops working."""
        token = new_token()
        studies = sa.select(STUDY.c.id).where(STUDY.c.name == study).scalar_subquery()
        change = sa.update(ASSESSOR).where(ASSESSOR.c.study_id == studies, ASSESSOR.c.name == name)
        with self.engine.begin() as connection:
            if not connection.execute(change.values(token_hash=hash_token(token))).rowcount:
                raise InputError(f"Study {study} has no assessor named {name}.")
        return token

    def assessor(self, token: str) -> Assessor | None:
        """Whose token this is, if anybody's."""
        query = sa.select(ASSESSOR, STUDY.c.name.label("study"), STUDY.c.secret).join(STUDY)
        with self.engine.connect() as connection:
            row = connection.execute(query.where(ASSESSOR.c.token_hash == hash_token(token))).first()
        if row is None or not hmac.compare_digest(hash_token(token), row.token_hash):
            return None
        return Assessor(row.id, row.name, row.study, row.token_hash, row.secret)

    def next_open(self, assessor_id: int, after: int = 0) -> int | None:
        """The first undecided position behind `after`, else the first of all; None when everything is decided."""
        is_open = sa.select(sa.func.min(_ROW.position)).where(
            _ROW.assessor_id == assessor_id, _ROW.decided_at.is_(None)
        )
        with self.engine.connect() as connection:
            behind = connection.scalar(is_open.where(_ROW.position > after))
            return behind if behind is not None else connection.scalar(is_open)

    def progress(self, assessor_id: int) -> tuple[int, int]:
        """How many of an assessor's assignments are decided, and how many there are."""
        with self.engine.connect() as connection:
            return _progress(connection, assessor_id)

    def last_decided(self, assessor_id: int) -> tuple[int, int] | None:
        """Position and revision of the assignment decided last."""
        with self.engine.connect() as connection:
            return _last_decided(connection, assessor_id)

    def task(self, assessor_id: int, position: int) -> Task | None:
        """One assignment for its page; notes when it was first opened."""
        mine = [_ROW.assessor_id == assessor_id, _ROW.position == position]
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(ASSIGNMENT, ITEM.c.content).join(ITEM).where(*mine)).first()
            if row is None:
                return None
            if row.opened_at is None:
                connection.rollback()
                opened = sa.update(ASSIGNMENT).where(_ROW.id == row.id, _ROW.opened_at.is_(None))
                connection.execute(opened.values(opened_at=now()))
                connection.commit()
            done, total = _progress(connection, assessor_id)
            previous = _last_decided(connection, assessor_id)
        return Task(
            position=row.position,
            revision=row.revision,
            pair=_pair(row.content),
            left=row.left,
            answer=row.answer if row.decided_at else None,
            draft=row.draft,
            total=total,
            done=done,
            previous=previous,
        )

    def save_draft(self, assessor_id: int, position: int, revision: int, draft: Answer) -> bool:
        """Keep what is entered so far; False where the answer changed since the page was made."""
        return self._change(assessor_id, position, revision, draft=draft)

    def submit(
        self, assessor_id: int, position: int, revision: int, answer: Answer
    ) -> Literal["stored", "same", "conflict", "absent"]:
        """Store a verdict. `same`: this very answer is stored already; `conflict`: another one is, and it stays."""
        decided = {"answer": answer, "draft": None, "decided_at": now(), "revision": revision + 1}
        if self._change(assessor_id, position, revision, **decided):
            return "stored"
        task = self.task(assessor_id, position)
        if task is None:
            return "absent"
        return "same" if task.answer == answer else "conflict"

    def undo(self, assessor_id: int, position: int, revision: int) -> bool:
        """Turn a verdict back into a draft; False where it changed since the page was made."""
        undecided = {"decided_at": None, "draft": _ROW.answer, "answer": sa.null(), "revision": revision + 1}
        return self._change(assessor_id, position, revision, **undecided)

    def comparisons(self, study: str) -> Iterator[Comparison]:
        """Every verdict of a study as a `Comparison`, by assessor and position."""
        names = ASSESSOR.c.name.label("judge")
        query = sa.select(ASSIGNMENT, ITEM.c.content, names).select_from(
            ASSIGNMENT.join(ITEM)
            .join(ASSESSOR, _ROW.assessor_id == ASSESSOR.c.id)
            .join(STUDY, ASSESSOR.c.study_id == STUDY.c.id)
        )
        query = query.where(STUDY.c.name == study, _ROW.decided_at.is_not(None)).order_by(ASSESSOR.c.id, _ROW.position)
        with self.engine.connect() as connection:
            for row in connection.execute(query):
                yield _comparison(row)

    def standing(self, study: str) -> dict[str, tuple[int, int]]:
        """Per assessor, how many assignments are decided, and how many there are."""
        with self.engine.connect() as connection:
            people = connection.execute(
                sa.select(ASSESSOR.c.id, ASSESSOR.c.name)
                .join(STUDY)
                .where(STUDY.c.name == study)
                .order_by(ASSESSOR.c.id)
            ).all()
        return {person.name: self.progress(person.id) for person in people}

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _change(self, assessor_id: int, position: int, seen: int, **values: Any) -> bool:
        """Change an assignment if its revision is still the one that was seen; whether it was."""
        mine = [_ROW.assessor_id == assessor_id, _ROW.position == position, _ROW.revision == seen]
        with self.engine.begin() as connection:
            return connection.execute(sa.update(ASSIGNMENT).where(*mine).values(**values)).rowcount == 1

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.OperationalError, sa.exc.DatabaseError) as error:
            raise InputError(f"{self.location} cannot be used as a study database: {error.orig}") from None


def _progress(connection: sa.Connection, assessor_id: int) -> tuple[int, int]:
    counts = sa.select(sa.func.count(_ROW.decided_at), sa.func.count()).where(_ROW.assessor_id == assessor_id)
    done, total = connection.execute(counts).one()
    return done, total


def _last_decided(connection: sa.Connection, assessor_id: int) -> tuple[int, int] | None:
    decided = [_ROW.assessor_id == assessor_id, _ROW.decided_at.is_not(None)]
    last = sa.select(_ROW.position, _ROW.revision).where(*decided)
    row = connection.execute(last.order_by(_ROW.decided_at.desc(), _ROW.position.desc()).limit(1)).first()
    return None if row is None else (row.position, row.revision)


def _inserted(connection: sa.Connection, table: sa.Table, values: dict[str, Any]) -> int:
    key = connection.execute(sa.insert(table).values(**values)).inserted_primary_key
    assert key is not None
    return int(key[0])


def _pair(content: dict[str, Any]) -> Pair:
    prompt = content["prompt"]
    return Pair(**{**content, "prompt": prompt if isinstance(prompt, str) else tuple(prompt)})


def _comparison(row: sa.Row[Any]) -> Comparison:
    left: Side = row.left
    return replace(
        _pair(row.content).judged(row.judge, verdict_from_shown(row.answer["verdict"], left=left), left=left),
        criteria={name: verdict_from_shown(shown, left=left) for name, shown in row.answer["criteria"].items()},
        comment=row.answer["comment"] or None,
        seconds=seconds_between(row.opened_at, row.decided_at),
        time=row.decided_at,
    )


def new_token() -> str:
    """A private token: 256 random bits, safe in a URL."""
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """What is stored instead of a token. SHA-256 without salt is enough: the token is random, not a password."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def open_engine(location: str) -> Engine:
    """The engine for a database URL, or for the path of an SQLite file."""
    try:
        url = make_url(location if "://" in location else f"sqlite:///{Path(location).absolute()}")
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        local = url.get_backend_name() == "sqlite"
        engine = sa.create_engine(url, pool_size=20, max_overflow=20, pool_timeout=30, pool_pre_ping=not local)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        said = str(error).replace(location, redact(location))
        raise InputError(f"The store is neither a path nor a database URL that can be opened here: {said}") from None
    if local:
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        sa.event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    """Readers beside one writer, a verdict synced to disk before it is confirmed, waiting instead of failing."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def now() -> str:
    """The time as it is stored: ISO 8601, UTC, microseconds, so that it sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def seconds_between(start: str | None, end: str) -> float | None:
    """Seconds from one stored time to another."""
    return None if start is None else (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
