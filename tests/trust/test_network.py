"""Nothing leaves the machine unasked: a whole run works, and tries nothing, where there is no network at all."""

from __future__ import annotations

import os
import subprocess
import sys

from trust.conftest import PROGRAM, Isolated


def test_a_run_needs_no_network_and_tries_none(isolated: Isolated) -> None:
    assert (isolated.folder / "report" / "index.html").stat().st_size > 10_000
    assert isolated.attempts == ""


def test_an_attempt_would_have_been_seen(tmp_path) -> None:
    """The same watch, on a process that asks a hub: what the test above relies on."""
    attempts = tmp_path / "attempts"
    environment = {**os.environ, "ATTEMPTS": str(attempts), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = PROGRAM.partition("from exalign")[0] + "import socket; socket.create_connection(('127.0.0.1', 9))"
    subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert "socket.connect" in attempts.read_text()


def test_usage_data_is_off_from_the_first_import_unless_the_user_says_otherwise() -> None:
    code = (
        "import exalign, huggingface_hub.constants as hub, os; "
        "print(hub.HF_HUB_DISABLE_TELEMETRY, os.environ['DISABLE_SAFETENSORS_CONVERSION'], "
        "os.environ['RAY_USAGE_STATS_ENABLED'], os.environ['VLLM_NO_USAGE_STATS'])"
    )
    names = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_SAFETENSORS_CONVERSION",
             "RAY_USAGE_STATS_ENABLED", "VLLM_NO_USAGE_STATS")  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    for more, printed in ({}, "True 1 0 1"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False 1 0 1"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **more}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == printed
