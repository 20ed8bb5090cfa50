"""The notebooks run in a Jupyter kernel from their first cell to the last, and are kept without output.

What holds after the last cell is one more cell, whose assertions fail the run.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "examples"
A_VERDICT = """
assert {method.name for method in evidence.methods} == {"exo", "dpo"}
assert (folder / evidence.verdict.folder / "config.json").is_file()
assert Path("runs/notebook/report/index.html").is_file()
gains = {m.name: max(point.gain.low for point in m.points) for m in evidence.methods}
assert gains["exo"] > 0, gains  # some checkpoint is surely better than the supervised policy
"""
THEOREMS = """
assert abs(cosine(-problem.reverse_kl_gradient(logits), ascent) - 1.0) < 1e-6
assert cosine(-problem.forward_kl_gradient(logits), ascent) < 0.99
assert abs(errors["EXO"].bias_slope(at_least=8).value + 1.0) < 0.2
"""


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / name, as_version=4)


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_no_output_is_kept(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.parametrize(("name", "holds"), [("first_run.ipynb", A_VERDICT), ("exact.ipynb", THEOREMS)])
def test_what_a_notebook_ends_with_holds(name: str, holds: str, tmp_path: Path) -> None:
    notebook = read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(holds))
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 1  # the figure that its text speaks of
