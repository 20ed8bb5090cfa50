"""Processes that start quickly: torch is imported once, then forked for every worker."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext

import pytest


@pytest.fixture(scope="session")
def workers() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.tiny_world", "training.launched"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the server looks for what it preloads
        context.Process(target=os.getpid).start()
    return context
