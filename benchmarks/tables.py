"""Render the results of `benchmarks.all` into docs/performance.md: `python -m benchmarks.tables FOLDER`.

The document holds `<!-- NAME -->` … `<!-- /NAME -->` pairs; what stands between them is replaced. A result that is not
in the folder is said to be missing; no number is written by hand. The one file of `benchmarks.gpu` in the place of the
folder fills the tables of its section, and no others.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.growth import draw

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
SHAPE_NAMES = {"tldr": "TL;DR (350 / 40)", "hh": "HH (150 / 70)", "imdb": "IMDB (10 / 230)", "tiny": "tiny (12 / 6)"}
NOT_MEASURED = "Not measured yet."
Results = dict[str, dict[str, Any]]


def read(folder: Path) -> Results:
    """All results of the folder, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def render(document: str, results: Results, *, gpu_alone: bool = False) -> str:
    """The document with every table made anew, or those of a GPU; an unknown name in it is a `KeyError`."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name.startswith("gpu-") != gpu_alone:
            return match.group(0)
        return f"<!-- {name} -->\n{TABLES[name](results) or NOT_MEASURED}\n<!-- /{name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", fill, document, flags=re.DOTALL)


def machine(results: Results) -> str:
    return _machine(result for name, result in results.items() if not name.startswith("memory"))


def _machine(results: Iterable[dict[str, Any]]) -> str:
    timed = [result["machine"] for result in results]
    if not timed:
        return ""
    about = timed[0]
    loads = [entry["load"] for entry in timed]
    return (
        f"{about['processor']} with {about['instructions']}, {about['cores']} cores, {about['threads']} threads, "
        f"{about['memory_gib']} GiB; Python {about['python']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, accelerate {about['accelerate']}, "
        + "".join(f"{label} {about[name]}, " for label, name in (("TRL", "trl"), ("vLLM", "vllm")) if about.get(name))
        + f"load average {min(loads):.1f}–{max(loads):.1f}."
    )


def _clock(results: Iterable[dict[str, Any]]) -> str:
    cpu = any(result["clock"] == "cpu" for result in results)
    return " Seconds are those that the way's processes computed, on one core, not those of the wall." if cpu else ""


def step(results: Results) -> str:
    peers = ["trl-best", "trl-completions", "official", "trl-defaults"]
    rows = []
    for result in _of(results, "step"):
        found = result["contenders"]
        ours = found["exalign"]
        cells = [SHAPE_NAMES[result["shape"]], result["k"], result["prompts"], f"{ours['seconds']:.2f} s"]
        cells += [_ratio(found.get(name)) for name in peers]
        rows.append([*cells, f"{ours['tokens_per_second']:,.0f}", f"{ours['share_of_peak']:.0%}"])
    return _table(
        "shape (mean prompt / completion tokens)|K|prompts|exalign|TRL, best shipped options|"
        "TRL, head on completions only|official code's way|TRL, defaults (bf16)|exalign tokens/s|share of peak",
        rows,
    )


def sizes(results: Results) -> str:
    rows = []
    for result in _of(results, "step"):
        for row in result["contenders"].values():
            difference = row["difference"]
            measured = f"{row['seconds']:.2f} ({row['fastest']:.2f}–{row['slowest']:.2f}, n = {row['n']})"
            rows.append(
                [
                    SHAPE_NAMES[result["shape"]],
                    result["k"],
                    row["label"],
                    row["precision"],
                    row["micro_batch"],
                    measured,
                    f"{difference['loss']:.0e}",
                    f"{difference['gradient']:.0e}",
                ]
            )
    return _table("shape|K|way|precision|micro-batch|seconds, median|loss off by|gradient off by", rows)


def bf16(results: Results) -> str:
    rows = []
    for result in _of(results, "step"):
        row = result["contenders"].get("exalign-bf16")
        if row:
            base = result["contenders"]["exalign"]["seconds"]
            peak = result["peak_gflops"]
            rows.append(
                [
                    SHAPE_NAMES[result["shape"]],
                    result["k"],
                    f"{row['seconds']:.2f} s",
                    f"{base / row['seconds']:.2f}",
                    f"{peak['fp32']:,.0f}",
                    f"{peak['bf16']:,.0f}",
                    f"{row['share_of_peak']:.0%}",
                ]
            )
    return _table("shape|K|seconds|times faster than fp32|peak fp32, GFLOP/s|peak bf16|share of bf16 peak", rows)


def sample(results: Results, *, vllm: bool = False) -> str:
    """Those with vLLM, whose environment is another, have a table of their own with their machine."""
    rows, shown = [], [result for result in _of(results, "sample") if ("vllm" in result["contenders"]) == vllm]
    for result in shown:
        for row in result["contenders"].values():
            rows.append(
                [
                    SHAPE_NAMES[result["shape"]],
                    result["k"],
                    result["prompts"],
                    row["label"],
                    row["rows_at_once"] or "–",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['ratio']:.2f}",
                    f"{row['share_of_peak']:.0%}",
                    row["n"],
                ]
            )
    table = _table("shape|K|prompts|way|completions at once|tokens/s|time, exalign = 1|share of peak|n", rows)
    return f"{_machine(shown)}{_clock(shown)}\n\n{table}" if vllm and shown else table


def score(results: Results) -> str:
    rows = []
    for result in _of(results, "score"):
        for row in result["contenders"].values():
            rows.append(
                [
                    SHAPE_NAMES[result["shape"]],
                    result["k"],
                    result["prompts"],
                    row["label"],
                    row["micro_batch"],
                    f"{row['seconds']:.2f}",
                    f"{row['ratio']:.2f}",
                    f"{row['share_of_peak']:.0%}",
                    row["n"],
                ]
            )
    return _table("shape|K|prompts|way|at once|seconds|time, exalign = 1|share of peak|n", rows)


def on_policy(results: Results) -> str:
    rows, shown = [], _of(results, "on_policy")
    for result in shown:
        for row in result["contenders"].values():
            rows.append(
                [
                    f"{SHAPE_NAMES[result['shape']]}, K = {result['k']}",
                    row["label"],
                    f"{row['seconds']:.2f}",
                    f"{row['ratio']:.2f}",
                    *(f"{row['parts'][part]:.2f}" for part in ("drawing", "scoring", "rest")),
                    f"{row['samples_per_second']:.1f}",
                    f"{row['first_reward']:.3f} → {row['last_reward']:.3f}",
                    row["n"],
                ]
            )
    head = "shape|way|seconds a step|time, exalign's EXO = 1|drawing|scoring|the rest|scored samples a second"
    table = _table(head + "|reward of the first and the last step's samples|n", rows)
    return f"{_machine(shown)}{_clock(shown)}\n\n{table}" if shown else ""


def memory(results: Results) -> str:
    rows = []
    for result in _of(results, "memory"):
        for row in result["contenders"].values():
            rows.append(
                [
                    SHAPE_NAMES[result["shape"]],
                    result["k"],
                    row["label"],
                    row["micro_batch"],
                    f"{row['bytes'] / 1000000.0:,.0f}",
                    f"{row['ratio']:.1f}",
                ]
            )
    return _table("shape|K|way|micro-batch|peak above state, MB|exalign = 1", rows)


def sweep(results: Results) -> str:
    rows = []
    for found in results.get("sweep", {}).get("sweeps", []):
        points = ", ".join(f"{point['value']}: {point['seconds']:.2f} s" for point in found["points"])
        others = ", ".join(f"{name} {value}" for name, value in found["others"].items())
        rows.append([found["dimension"], points, f"{found['slope']:.2f}", f"{found['work_slope']:.2f}", others])
    return _table("grows|seconds of a step|slope|slope of the necessary work|the others", rows)


def profile(results: Results) -> str:
    rows = []
    for result in _of(results, "profile"):
        for row in result["terms"]:
            if row["share"] >= 0.03:
                kernels = ", ".join(f"{name.removeprefix('aten::')} {s:.0%}" for name, s in row["kernels"].items())
                mark = "yes" if row["necessary"] else "**no**"
                rows.append(
                    [SHAPE_NAMES[result["shape"]], result["k"], row["term"], f"{row['share']:.1%}", mark, kernels]
                )
    return _table("shape|K|term|share of the step|necessary|largest kernels", rows)


def gpu(part: str, results: Results) -> str:
    """The rows of a part of `benchmarks.gpu`, whatever they are, and what failed in it."""
    found = results.get("gpu", {}).get("parts", {}).get(part, {})
    rows = [row for cell in found.values() for row in cell.get("rows", ())]
    names = list(dict.fromkeys(name for row in rows for name in row))
    failed = [f"{name}: {cell['failed']}" for name, cell in found.items() if "failed" in cell]
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    return "\n\n".join(filter(None, [_table("|".join(names), cells), *failed]))


def gpu_machine(results: Results) -> str:
    return ", ".join(f"{name} {value}" for name, value in results.get("gpu", {}).get("machine", {}).items() if value)


TABLES: dict[str, Callable[[Results], str]] = {
    "gpu-machine": gpu_machine,
    **{f"gpu-{part}": partial(gpu, part) for part in ("parity", "kernel", "step", "sample", "profile", "stages")},
    "machine": machine,
    "step": step,
    "sizes": sizes,
    "bf16": bf16,
    "sample": sample,
    "sample-vllm": partial(sample, vllm=True),
    "score": score,
    "on-policy": on_policy,
    "memory": memory,
    "sweep": sweep,
    "profile": profile,
}


def _of(results: Results, benchmark: str) -> list[dict[str, Any]]:
    found = [result for result in results.values() if result["benchmark"] == benchmark]
    return sorted(found, key=lambda result: (list(SHAPE_NAMES).index(result["shape"]), result["k"]))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value)


def _ratio(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['ratio']:.1f}"


def _table(header: str, rows: Iterable[Iterable[object]]) -> str:
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    names = header.split("|")
    return "\n".join(["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *lines]) if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where `benchmarks.all` wrote, or the file of `benchmarks.gpu`")
    given = parser.parse_args()
    alone = given.folder.is_file()
    results = {"gpu": json.loads(given.folder.read_text(encoding="utf-8"))} if alone else read(given.folder)
    if "sweep" in results:
        draw(results["sweep"], DOCUMENT.parent / "images" / "cost-growth.png")
    text = render(DOCUMENT.read_text(encoding="utf-8"), results, gpu_alone=alone)
    DOCUMENT.write_text(text, encoding="utf-8")
    print(f"{DOCUMENT.name}: {len(results)} results")


if __name__ == "__main__":
    main()
