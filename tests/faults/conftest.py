from __future__ import annotations

import os

import pytest
from filelock import FileLock

from faults.starts import Starter
from faults.world import World, finished_world, make_world


@pytest.fixture(scope="session")
def faulty_world(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run of every kind of stage, one for all processes of the tests, which copy it."""
    several = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if several is None:
        return make_world(starter, tmp_path_factory.mktemp("faults"))
    place = tmp_path_factory.getbasetemp().parent / f"faults-{several}"
    place.mkdir(exist_ok=True)
    with FileLock(place / "lock"):
        return finished_world(place) if (place / "finished").exists() else make_world(starter, place)
