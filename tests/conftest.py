"""What all tests share: no clock in property tests, and processes that start quickly, forked from one with torch."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Generator, Iterator
from multiprocessing.context import ForkServerContext

import pytest
from hypothesis import HealthCheck, settings

from faults.starts import Starter

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more gain nothing on such small models, and round sums differently
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

LONGEST = [
    "test_cluster", "test_methods", "test_processes_run", "test_damage", "test_on_a_device", "test_processes",
    "test_run", "test_search", "test_kills", "test_winner", "test_ppo", "test_given", "test_held_out", "test_field",
    "test_wheel", "test_notebooks", "test_network", "test_sweep", "test_step", "test_gpu",
]  # fmt: skip
"""Files that are begun first, so that no process of several is left alone with one of them at the end."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported here stays, so it is not searched for garbage, neither now nor in any later collection."""
    gc.disable()
    found = yield
    gc.freeze()
    gc.enable()
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def workers() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.tiny_world", "training.launched", "peft", "faults.frozen"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the server looks for what it preloads
        context.Process(target=os.getpid).start()
    return context


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """Starts `exalign` as a process of its own in milliseconds."""
    starter = Starter()
    yield starter
    starter.close()
