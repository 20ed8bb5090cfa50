"""A study by people: which answers meet, who judges them, and what stands on the left; and where it lives.

A plan is a function of the samples and the seed. All match-ups use the same prompts, so that they can be compared, and
those are the prompts that `exalign judge` takes with the same seed.

A store is any database that SQLAlchemy speaks to, SQLite by default. One row per assignment holds everything its
assessor does there, so there can be no second verdict for it. `revision` counts how often the row's answer changed; a
change names the revision that it saw and is one conditional UPDATE, so a repeated request changes nothing, and a window
with an old page cannot overwrite what a newer one stored.
"""

from __future__ import annotations

import hashlib
import random
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from exalign.errors import InputError
from exalign.evaluation.run_folder import REFERENCE, RunFolder
from exalign.judging.comparisons import OTHER, Comparison, Pair, Side, verdict_from_shown
from exalign.judging.pairing import choose, match_up, reference_texts, system
from exalign.redaction import redact
from exalign.storage import writing


@dataclass(frozen=True, slots=True)
class Assignment:
    """Assessor (index) judges item (index) as number `position` (from 1), with the side `left` on the left."""

    assessor: int
    item: int
    position: int
    left: Side


@dataclass(frozen=True, slots=True)
class Study:
    """A planned study. `counts` says what was left out, and what is worth knowing about the items (`identical_pair`,
    `no_reference`)."""

    name: str
    seed: int
    assessors: tuple[str, ...]
    items: tuple[Pair, ...]
    assignments: tuple[Assignment, ...]
    counts: dict[str, int]


def parse_matches(text: str) -> list[tuple[str, str]]:
    """`exo:dpo,exo:sft` as pairs of systems.

    >>> parse_matches("exo:dpo, exo:sft")
    [('exo', 'dpo'), ('exo', 'sft')]
    """
    pairs = []
    for part in text.split(","):
        names = [name.strip() for name in part.split(":")]
        if len(names) != 2 or not all(names):
            raise InputError(f"--match: {part.strip()!r} is not FIRST:SECOND (for example exo:dpo,exo:sft).")
        if names[0] == names[1]:
            raise InputError(f"--match: {names[0]} cannot meet itself.")
        pairs.append((names[0], names[1]))
    if len({frozenset(pair) for pair in pairs}) < len(pairs):
        raise InputError(f"--match: {text} names a match-up twice.")
    return pairs


def plan_study(
    run: Path,
    matches: Sequence[tuple[str, str]],
    *,
    name: str,
    num_prompts: int | None,
    assessors: Sequence[str],
    per_item: int | None = None,
    seed: int = 0,
) -> Study:
    """A study of `num_prompts` prompts × matches, each judged by `per_item` of the assessors (default: by all).

    None: 100 prompts, or all of fewer. The systems are named as `pairing` says. Too few prompts that all of them
    answered, or more judgements per item than assessors, is an `InputError`.
    """
    per_item = len(assessors) if per_item is None else per_item
    if not 1 <= per_item <= len(assessors):
        raise InputError(f"{per_item} judgements per comparison need as many assessors; there are {len(assessors)}.")
    if len(set(assessors)) < len(assessors):
        raise InputError("Two assessors have the same name; their verdicts could not be told apart.")
    folder = RunFolder(run)
    systems = {one: system(folder, one) for one in dict.fromkeys(one for match in matches for one in match)}
    # Where it is compared, who read it beside another comparison of its prompt would know it again.
    references = {} if REFERENCE in systems else reference_texts(folder)
    found = [match_up(systems[first], systems[second], references) for first, second in matches]
    shared = set.intersection(*({pair.prompt_id for pair in one.pairs} for one in found))
    num_prompts = min(100, len(shared)) if num_prompts is None else num_prompts
    if not 1 <= num_prompts <= len(shared):
        said = f"{', '.join(systems)} share {len(shared)} prompts in {run}"
        raise InputError(f"--prompts {num_prompts}: {said}.")
    # Chosen pairs stay in the order of the match-ups within each prompt, which `assign` relies on.
    pairs = (pair for one in found for pair in one.pairs if pair.prompt_id in shared)
    items = choose(pairs, prompts=num_prompts, seed=seed)
    counts = sum((one.counts for one in found), Counter())
    del counts["prompts_available"]
    for item in items:
        counts["identical_pair"] += item.identical
        counts["no_reference"] += item.reference is None
    assignments = assign(len(items), len(assessors), per_item, num_matches=len(matches), seed=seed)
    return Study(name, seed, tuple(assessors), items, assignments, dict(+counts))


def assign(num_items: int, num_assessors: int, per_item: int, *, num_matches: int, seed: int) -> tuple[Assignment, ...]:
    """Who judges which item, in which order and with which side on the left; item i belongs to match-up i % matches.

    Balanced: assessors' loads differ by at most 1. Of the judgements of one item, the sides differ by at most 1. For
    one assessor in one match-up they are kept as even as the items allow (a test bounds the difference by 3). Everybody
    meets everybody: an item's people are those with the least to do, of these who have judged least together.
    Blind: each assessor's order is shuffled on its own, so that it tells nothing about match-up or side.
    """
    rng = random.Random(f"assign-{seed}")
    met = Counter[tuple[int, int]]()
    chosen: list[list[tuple[int, Side]]] = [[] for _ in range(num_assessors)]
    leaning = Counter[tuple[int, int]]()
    order = [i for match in range(num_matches) for i in range(match, num_items, num_matches)]
    for item in order:
        people: list[int] = []
        for _ in range(per_item):
            free = rng.sample([n for n in range(num_assessors) if n not in people], num_assessors - len(people))
            people.append(min(free, key=lambda n: (len(chosen[n]), sum(met[n, other] for other in people))))
        met.update(permutations(people, 2))
        rng.shuffle(people)
        people.sort(key=lambda person: leaning[person, item % num_matches])
        for k, person in enumerate(people):
            lean = leaning[person, item % num_matches]
            middle = per_item % 2 == 1 and k == per_item // 2
            on_left = (lean < 0 or (lean == 0 and rng.random() < 0.5)) if middle else k < per_item // 2
            leaning[person, item % num_matches] += 1 if on_left else -1
            chosen[person].append((item, "first" if on_left else "second"))
    assignments = []
    for person, tasks in enumerate(chosen):
        rng.shuffle(tasks)
        assignments += [Assignment(person, item, n, left) for n, (item, left) in enumerate(tasks, start=1)]
    return tuple(assignments)


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

    @property
    def left_text(self) -> str:
        return self.pair.text(self.left)

    @property
    def right_text(self) -> str:
        return self.pair.text(OTHER[self.left])


class Store:
    """A study database by URL, or by path for SQLite. Every method is a short transaction and may run in any thread."""

    def __init__(self, location: str) -> None:
        self.engine = open_engine(location)
        self.location = self.engine.url.render_as_string(hide_password=True)

    def create(self, study: Study) -> dict[str, str]:
        """Store a planned study; each assessor's token, which is stored only as a hash and cannot be had again."""
        tokens = {name: secrets.token_urlsafe(32) for name in study.assessors}
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
        token = secrets.token_urlsafe(32)
        studies = sa.select(STUDY.c.id).where(STUDY.c.name == study).scalar_subquery()
        change = sa.update(ASSESSOR).where(ASSESSOR.c.study_id == studies, ASSESSOR.c.name == name)
        with self._reachable(), self.engine.begin() as connection:
            if not connection.execute(change.values(token_hash=hash_token(token))).rowcount:
                raise InputError(f"Study {study} has no assessor named {name}.")
        return token

    def assessor(self, token: str) -> Assessor | None:
        """Whose token this is, if anybody's."""
        query = sa.select(ASSESSOR, STUDY.c.name.label("study"), STUDY.c.secret).join(STUDY)
        rows = self._rows(query.where(ASSESSOR.c.token_hash == hash_token(token)))
        return next((Assessor(row.id, row.name, row.study, row.token_hash, row.secret) for row in rows), None)

    def next_open(self, assessor_id: int, after: int = 0) -> int | None:
        """The first undecided position behind `after`, else the first of all; None when everything is decided."""
        is_open = sa.select(sa.func.min(_ROW.position)).where(
            _ROW.assessor_id == assessor_id, _ROW.decided_at.is_(None)
        )
        ((behind,),), ((first,),) = self._rows(is_open.where(_ROW.position > after)), self._rows(is_open)
        return first if behind is None else behind

    def progress(self, assessor_id: int) -> tuple[int, int]:
        """How many of an assessor's assignments are decided, and how many there are."""
        counts = sa.select(sa.func.count(_ROW.decided_at), sa.func.count()).where(_ROW.assessor_id == assessor_id)
        ((done, total),) = self._rows(counts)
        return done, total

    def last_decided(self, assessor_id: int) -> tuple[int, int] | None:
        """Position and revision of the assignment decided last: what Undo takes back."""
        decided = [_ROW.assessor_id == assessor_id, _ROW.decided_at.is_not(None)]
        query = sa.select(_ROW.position, _ROW.revision).where(*decided)
        rows = self._rows(query.order_by(_ROW.decided_at.desc(), _ROW.position.desc()).limit(1))
        return next(((row.position, row.revision) for row in rows), None)

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
        answer = row.answer if row.decided_at else None
        return Task(row.position, row.revision, _pair(row.content), row.left, answer, row.draft)

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

    def comparisons(self, study: str) -> list[Comparison]:
        """Every verdict of a study as a `Comparison`, by assessor and position."""
        names = ASSESSOR.c.name.label("judge")
        query = sa.select(ASSIGNMENT, ITEM.c.content, names).select_from(
            ASSIGNMENT.join(ITEM)
            .join(ASSESSOR, _ROW.assessor_id == ASSESSOR.c.id)
            .join(STUDY, ASSESSOR.c.study_id == STUDY.c.id)
        )
        query = query.where(STUDY.c.name == study, _ROW.decided_at.is_not(None)).order_by(ASSESSOR.c.id, _ROW.position)
        try:
            with self._reachable():
                return [_comparison(row) for row in self._rows(query)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.location} holds what exalign did not write ({error!r:.200}).") from None

    def standing(self, study: str) -> dict[str, tuple[int, int]]:
        """Per assessor, how many assignments are decided, and how many there are."""
        people = sa.select(ASSESSOR.c.id, ASSESSOR.c.name).join(STUDY).where(STUDY.c.name == study)
        with self._reachable():
            return {person.name: self.progress(person.id) for person in self._rows(people.order_by(ASSESSOR.c.id))}

    def close(self) -> None:
        self.engine.dispose()

    def _rows(self, query: sa.Executable) -> Sequence[Any]:
        with self.engine.connect() as connection:
            return connection.execute(query).all()

    def _change(self, assessor_id: int, position: int, seen: int, **values: Any) -> bool:
        """Change an assignment if its revision is still the one that was seen; whether it was."""
        mine = [_ROW.assessor_id == assessor_id, _ROW.position == position, _ROW.revision == seen]
        with self.engine.begin() as connection:
            return connection.execute(sa.update(ASSIGNMENT).where(*mine).values(**values)).rowcount == 1

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DatabaseError as error:
            raise InputError(f"{self.location} cannot be used as a study database: {error.orig}") from None


def _inserted(connection: sa.Connection, table: sa.Table, values: dict[str, Any]) -> int:
    key = connection.execute(sa.insert(table).values(**values)).inserted_primary_key
    assert key is not None
    return int(key[0])


def _pair(content: dict[str, Any]) -> Pair:
    prompt = content["prompt"]
    return Pair(**{**content, "prompt": prompt if isinstance(prompt, str) else tuple(prompt)})


def _comparison(row: sa.Row[Any]) -> Comparison:
    left: Side = row.left
    opened, decided = row.opened_at and datetime.fromisoformat(row.opened_at), datetime.fromisoformat(row.decided_at)
    return replace(
        _pair(row.content).judged(row.judge, verdict_from_shown(row.answer["verdict"], left=left), left=left),
        criteria={name: verdict_from_shown(shown, left=left) for name, shown in row.answer["criteria"].items()},
        comment=row.answer["comment"] or None,
        seconds=(decided - opened).total_seconds() if opened else None,
        time=row.decided_at,
    )


def hash_token(token: str) -> str:
    """What is stored instead of a token. SHA-256 without salt is enough: the token is random, not a password."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def open_engine(location: str) -> Engine:
    """The engine for a database URL, or for the path of an SQLite file."""
    try:
        path = str(Path(location).absolute())  # pasted into an address, a ? or % in it would mean something else
        url = make_url(location) if "://" in location else sa.URL.create("sqlite", database=path)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        local = url.get_backend_name() == "sqlite"
        engine = sa.create_engine(url, pool_size=20, max_overflow=20, pool_timeout=30, pool_pre_ping=not local)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, ValueError, TypeError) as error:
        said = str(error).replace(location, redact(location))
        raise InputError(f"The store is neither a path nor a database URL that can be opened here: {said}") from None
    if local:
        if url.database:
            with writing(Path(url.database)):
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
