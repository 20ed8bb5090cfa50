"""What all tests share: no clock in property tests, and processes that start quickly, forked from one with torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext

import pytest
from hypothesis import HealthCheck, settings

from faults.starts import Starter

settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def workers() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.tiny_world", "training.launched"])
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
