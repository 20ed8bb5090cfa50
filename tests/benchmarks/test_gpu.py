"""What `make gpu` will run on a card, at tiny sizes: all of it on the CPU, and on the pretend accelerator."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from benchmarks import gpu, tables
from device.pretend import apart


def rows_of(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, cells in results["parts"].items():
        assert all("rows" in cell for cell in cells.values()), cells
        found[name] = [row for cell in cells.values() for row in cell["rows"]]
    return {name: rows for name, rows in found.items() if rows}


@pytest.mark.parametrize("where", ["cpu", "pretend"])
def test_every_part_ends_and_its_numbers_agree(where, workers, tmp_path) -> None:
    out, on_device = tmp_path / "gpu.json", partial(apart, workers)
    parts = [name for name in gpu.PARTS if where == "cpu" or name != "stages"]  # which tests/device has
    for name in parts:
        given = (name, out, gpu.SIZES["tiny"], 60.0)
        gpu.run_part(*given) if where == "cpu" else on_device(gpu.run_part, *given)
    results = gpu.read(out)
    rows = rows_of(results)
    assert list(rows) == parts
    assert results["machine"]["device"].startswith(where)
    assert [row["precision"] for row in rows["parity"]] == ["fp32", "bf16"]
    for row, limit in zip(rows["parity"], (1e-6, 2e-2), strict=True):
        assert row["nats per token off, at most"] < limit and row["gradient off, of its norm"] < limit
    assert all(row["off from the CPU's, at most"] < 1e-4 for row in rows.get("stages", ()))
    assert rows["kernel"][0]["output off"] < 2e-2 and rows["kernel"][0]["gradients off"] < 2e-2
    ours, plain = rows["step"][:2]
    assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-2) and ours["loss"] != plain["loss"]
    assert {row["way"] for row in rows["sample"]} >= {"exalign", "generate"}
    assert all(row["draw, s"] > 0 for row in rows["sample"] if "draw, s" in row)


def test_it_goes_on_where_it_was_stopped(tmp_path) -> None:
    """What is there is not made again; what failed, or was cut off, comes after what never began."""
    out, begun = tmp_path / "gpu.json", []

    def cells(size: gpu.Size) -> gpu.Cells:
        def cell(name: str) -> list[gpu.Row]:
            begun.append(name)
            if name == "c" and begun.count("c") == 1:
                raise ValueError("no")
            return [{"n": len(begun)}]

        return {name: lambda name=name: cell(name) for name in "abcd"}  # type: ignore[misc]

    results = gpu.read(out)
    results["parts"]["parity"] = {"a": {"rows": []}, "b": {"failed": "it did not end in its time"}}
    out.write_text(json.dumps(results))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu.PARTS, "parity", (1.0, cells))
        gpu.run_part("parity", out, gpu.SIZES["tiny"], 60.0)
        assert begun == ["c", "d", "b"]
        assert gpu.read(out)["parts"]["parity"]["c"]["failed"].startswith("ValueError: no (run_part:")
        gpu.run_part("parity", out, gpu.SIZES["tiny"], 60.0)
        assert begun == ["c", "d", "b", "c"]
        gpu.run_part("parity", out, gpu.SIZES["tiny"], -1.0)
    assert begun == ["c", "d", "b", "c"]


def test_it_ends_in_its_minutes_and_says_what_is_not_there(tmp_path, capfd) -> None:
    said = gpu.run(tmp_path / "gpu.json", "tiny", 0.02)
    assert said.endswith(f"Not begun: {', '.join(gpu.PARTS)}.")


def test_the_shares_are_those_of_one_whole() -> None:
    assert sum(share for share, _ in gpu.PARTS.values()) == pytest.approx(1.0)


def test_the_tables_are_made_from_the_result(tmp_path) -> None:
    results = {"benchmark": "gpu", "machine": {"device": "NVIDIA X"}, "parts": {name: {} for name in gpu.PARTS}}
    results["parts"] |= {"step": {"a": {"rows": [{"way": "ours", "s": 0.01234}, {"way": "TRL: not installed"}]}}}
    results["parts"] |= {"kernel": {"b": {"failed": "ValueError: no"}}}
    document = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("step", "gpu-step", "gpu-kernel"))
    made = tables.render(document, {"gpu": results}, gpu_alone=True)
    assert "<!-- step -->\nold\n" in made
    assert "| ours | 0.0123 |\n| TRL: not installed | – |" in made and "b: ValueError: no" in made
