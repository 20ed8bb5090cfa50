"""The tables of a study database, and how it is opened."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from exalign.errors import InputError
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
