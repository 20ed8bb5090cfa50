"""Fixtures of the assessment tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exalign.judging.study import Store, Study, plan_study
from judging.people.staging import MATCHES, Server, write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    return lambda num_prompts, answer=None: write_run(tmp_path / "run", num_prompts, answer)


@pytest.fixture
def make_study(make_run: Callable[..., Path]) -> Callable[..., Study]:
    def make(num_prompts: int = 4, assessors: tuple[str, ...] = ("ann", "bob", "cho"), **options) -> Study:
        run = make_run(num_prompts, options.pop("answer", None))
        matches = options.pop("matches", MATCHES)
        return plan_study(run, matches, name="study", num_prompts=num_prompts, assessors=assessors, **options)

    return make


@pytest.fixture
def serve() -> Iterator[Callable[[str], Server]]:
    servers: list[Server] = []

    def start(store: str) -> Server:
        servers.append(Server(store))
        return servers[-1].start()

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(str(tmp_path / "study.sqlite"))
    yield store
    store.close()
