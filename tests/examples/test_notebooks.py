"""The notebooks run from their first cell to the last, in a folder of their own, and are kept without output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "examples"


def cells(name: str) -> list[dict[str, Any]]:
    found = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def ran(name: str) -> dict[str, Any]:
    """What is defined after the last cell."""
    names: dict[str, Any] = {}
    for cell in cells(name):
        exec("".join(cell["source"]), names)
    plt.close("all")
    return names


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_no_output_is_kept(name: str) -> None:
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(name))


def test_the_run_s_notebook_ends_with_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ran("first_run.ipynb")
    evidence = names["evidence"]
    assert {method.name for method in evidence.methods} == {"exo", "dpo"}
    assert (tmp_path / names["folder"] / evidence.verdict.folder / "config.json").is_file()
    assert (tmp_path / "runs/notebook/report/index.html").is_file()
    gains = {m.name: max(point.gain.low for point in m.points) for m in evidence.methods}
    assert gains["exo"] > 0  # some checkpoint is surely better than the supervised policy


def test_the_exact_notebook_says_what_the_theorems_say() -> None:
    names = ran("exact.ipynb")
    problem, logits, cosine = (names[name] for name in ("problem", "logits", "cosine"))
    assert cosine(-problem.reverse_kl_gradient(logits), names["ascent"]) == pytest.approx(1.0)
    assert cosine(-problem.forward_kl_gradient(logits), names["ascent"]) < 0.99
    assert names["errors"]["EXO"].bias_slope(at_least=8).value == pytest.approx(-1.0, abs=0.2)
