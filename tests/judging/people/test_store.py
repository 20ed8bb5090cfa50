"""The store keeps exactly one verdict per assignment, on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from exalign.errors import InputError
from exalign.judging.study import Store

LEFT = {"verdict": "left", "criteria": {"safe": "right"}, "comment": "good"}
TIE = {"verdict": "tie", "criteria": {}, "comment": ""}


def _tool(name: str) -> str | None:
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(installed[-1]) if installed else None)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a private PostgreSQL server on loopback; it refuses to run as root, so it runs as nobody then."""
    initdb, postgres = _tool("initdb"), _tool("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL's initdb and postgres are not installed")
    folder = Path(tempfile.mkdtemp(prefix="exalign-pg-", dir="/tmp"))
    user = "nobody" if os.getuid() == 0 else None
    if user:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = subprocess.run(
        [initdb, "-D", folder / "data", "-U", "study", "-A", "trust", "-E", "UTF8", "--no-sync"],
        user=user,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    server = subprocess.Popen(
        [postgres, "-D", folder / "data", "-p", str(port), "-k", folder, "-h", "127.0.0.1"],
        user=user,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"postgresql://study@127.0.0.1:{port}/postgres"
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    for _ in range(100):
        try:
            engine.connect().close()
            break
        except sa.exc.OperationalError:
            time.sleep(0.1)
    engine.dispose()
    yield url
    server.send_signal(signal.SIGINT)
    server.wait(timeout=30)
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request, tmp_path) -> Iterator[str]:
    if request.param == "sqlite":
        yield str(tmp_path / "folder" / "study.sqlite")
        return
    url = request.getfixturevalue("postgresql")
    yield url
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS assignment, item, assessor, study"))
    engine.dispose()


@pytest.fixture
def opened(location) -> Iterator[Store]:
    store = Store(location)
    yield store
    store.close()


def test_tokens_open_their_own_assessor_only_and_are_not_stored(opened, make_study):
    tokens = opened.create(make_study())
    people = {name: opened.assessor(token) for name, token in tokens.items()}
    assert {name: person.name for name, person in people.items()} == {name: name for name in tokens}
    assert len({person.id for person in people.values()}) == 3
    for wrong in ("", "x", tokens["ann"][:-1], tokens["ann"] + "x", "\x00", "\ud800"):
        assert opened.assessor(wrong) is None
    with opened.engine.connect() as connection:
        rows = str(connection.execute(sa.text("SELECT * FROM assessor")).all())
    assert not any(token in rows for token in tokens.values())


def test_a_renewed_token_replaces_the_old_one(opened, make_study):
    old = opened.create(make_study())["bob"]
    new = opened.renew_token("study", "bob")
    assert opened.assessor(old) is None
    assert opened.assessor(new).name == "bob"
    with pytest.raises(InputError, match="no assessor named zoe"):
        opened.renew_token("study", "zoe")


def test_a_repeated_verdict_is_stored_once_and_another_one_does_not_overwrite_it(opened, make_study):
    me = opened.assessor(opened.create(make_study())["ann"]).id
    assert opened.submit(me, 1, 0, LEFT) == "stored"
    assert opened.submit(me, 1, 0, LEFT) == "same"
    assert opened.submit(me, 1, 0, TIE) == "conflict"
    assert opened.task(me, 1).answer == LEFT
    assert opened.submit(me, 1, 1, TIE) == "stored"
    assert opened.task(me, 1).answer == TIE
    assert opened.submit(me, 999, 0, TIE) == "absent"
    assert len(list(opened.comparisons("study"))) == 1
    assert opened.progress(me) == (1, 12)


def test_drafts_are_kept_until_the_verdict_and_never_after_it(opened, make_study):
    me = opened.assessor(opened.create(make_study())["ann"]).id
    draft = {"verdict": None, "criteria": {}, "comment": "hm\x00\U0001f600"}
    assert opened.save_draft(me, 2, 0, draft)
    assert opened.task(me, 2).draft == draft
    assert opened.progress(me) == (0, 12)
    assert opened.submit(me, 2, 0, LEFT) == "stored"
    assert not opened.save_draft(me, 2, 0, draft)
    task = opened.task(me, 2)
    assert (task.answer, task.draft, task.revision) == (LEFT, None, 1)


def test_undo_turns_the_last_verdict_into_a_draft_once(opened, make_study):
    me = opened.assessor(opened.create(make_study())["ann"]).id
    opened.submit(me, 1, 0, LEFT)
    opened.submit(me, 3, 0, TIE)
    assert opened.last_decided(me) == (3, 1)
    assert opened.undo(me, 3, 1)
    assert not opened.undo(me, 3, 1)
    task = opened.task(me, 3)
    assert (task.answer, task.draft, opened.last_decided(me)) == (None, TIE, (1, 1))
    assert opened.progress(me) == (1, 12)
    assert [c.comment for c in opened.comparisons("study")] == ["good"]


def test_the_next_open_one_comes_after_this_one_and_then_from_the_start(opened, make_study):
    me = opened.assessor(opened.create(make_study(num_prompts=1))["ann"]).id
    assert opened.next_open(me) == 1
    opened.submit(me, 2, 0, TIE)
    assert opened.next_open(me, after=1) == 3
    opened.submit(me, 3, 0, TIE)
    assert opened.next_open(me, after=3) == 1
    opened.submit(me, 1, 0, TIE)
    assert opened.next_open(me) is None


def test_what_was_seen_left_is_exported_as_the_system_that_stood_there(opened, make_study):
    study = make_study()
    tokens = opened.create(study)
    for name in study.assessors:
        me = opened.assessor(tokens[name]).id
        for position in range(1, 13):
            task = opened.task(me, position)
            verdict = "left" if task.left_text.startswith("exo") else "right"
            opened.submit(
                me, position, task.revision, {"verdict": verdict, "criteria": {"safe": verdict}, "comment": ""}
            )
    comparisons = list(opened.comparisons("study"))
    assert len(comparisons) == 36
    assert {(c.first, c.verdict, c.criteria["safe"]) for c in comparisons} == {("exo", "first", "first")}
    assert {c.left for c in comparisons} == {"first", "second"}
    assert len({c.key for c in comparisons}) == 36
    assert all(c.seconds >= 0 and c.reference and c.first_text.startswith("exo") for c in comparisons)
    assert opened.standing("study") == dict.fromkeys(study.assessors, (12, 12))


def test_any_text_survives(opened, make_study):
    texts = "\x00 \x85 \u202e \ud83d <script>alert(1)</script> \U0001f9c4 '; DROP TABLE item; --"
    study = make_study(num_prompts=1, answer=lambda system, i: "x")
    item = study.items[0]
    object.__setattr__(item, "first_text", texts)
    object.__setattr__(item, "second_text", texts)
    me = opened.assessor(opened.create(study)["ann"]).id
    assert texts in {opened.task(me, position).left_text for position in (1, 2, 3)}


def test_many_at_once_lose_and_double_nothing(opened, make_study):
    names = tuple(f"a{i}" for i in range(8))
    study = make_study(num_prompts=2, assessors=names)
    people = [opened.assessor(token).id for token in opened.create(study).values()]

    def work(job):
        person, position, answer = job
        return opened.submit(person, position, 0, answer)

    jobs = [(person, position, answer) for position in range(1, 7) for person in people for answer in (LEFT, TIE, LEFT)]
    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(work, jobs))
    assert outcomes.count("stored") == 48
    assert set(outcomes) == {"stored", "same", "conflict"}
    assert len({c.key for c in opened.comparisons("study")}) == len(list(opened.comparisons("study"))) == 48


def test_studies_share_a_store_but_not_a_name(opened, make_study):
    study = make_study()
    opened.create(study)
    with pytest.raises(InputError, match="already has a study named study"):
        opened.create(study)
    assert opened.check() == ["study"]


def test_a_store_without_a_study_says_so(location):
    store = Store(location)
    with pytest.raises(InputError, match="holds no study"):
        store.check()
    store.close()


def test_a_path_is_taken_as_it_is_spelled(tmp_path, make_study):
    for name in ("what?.sqlite", "50%41.sqlite", "a#b.sqlite"):
        store = Store(str(tmp_path / "studies" / name))
        store.create(make_study(num_prompts=1))
        store.close()
    assert {path.name for path in (tmp_path / "studies").glob("*.sqlite")} == {
        "what?.sqlite",
        "50%41.sqlite",
        "a#b.sqlite",
    }


def test_a_place_that_cannot_be_opened_is_an_input_error(tmp_path):
    addresses = ("nosuchdb://x/y", "postgresql://nobody@127.0.0.1:1/none", "postgresql://nobody@here:port/none")
    for wrong in (*addresses, str(tmp_path)):
        with pytest.raises(InputError):
            Store(wrong).check()
