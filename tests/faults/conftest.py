from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.starts import Starter
from faults.world import World, make_world


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def faulty_world(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run of every kind of stage."""
    return make_world(starter, tmp_path_factory.mktemp("faults"))
