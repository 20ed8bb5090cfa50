"""What a start costs: `python -m benchmarks.start`.

A small run is carried out, its models are made 200 GB large (the bytes are holes in sparse files) and its samples
10,000 shards, and the same command is given again: seconds and bytes that the start reads until it has found every
stage complete, in a process that has imported what it needs. Then records are written in more and more shards: the
slope of the time on log axes is 1 where each shard costs the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from exalign.checksums import stamp
from exalign.data.record import Completion, Record
from exalign.data.store import Header, RecordWriter, read_header
from exalign.storage import read_sealed, write_sealed

TARGET = "evaluate"
"""The last stage that a start skips; the report is made anew each time."""
SMALL = (
    "model.config={model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 96}",
    "sft={learning_rate: 3e-3, epochs: 1, batch_prompts: 16}",
    "reward={learning_rate: 1e-3, epochs: 1, batch_prompts: 16}",
    "sample={num_completions: 2, max_new_tokens: 6}",
    "align={exo-rw: {learning_rate: 1e-3, batch_prompts: 16, beta_pi: 0.5}}",
    "evaluate.prompts=8",
    "evaluate.samples=2",
    "evaluate.pool_prompts=4",
    "evaluate.pool_samples=4",
)
_START = """
import json, sys, time
import exalign.run.carry_out, exalign.run.recipe, transformers
from exalign.cli import main
def read():
    return int(open("/proc/self/io").read().split("rchar: ")[1].split()[0])
before, began = read(), time.perf_counter()
try:
    main(sys.argv[1:])
finally:
    print(json.dumps({"seconds": time.perf_counter() - began, "bytes": read() - before}))
"""


def start_of_a_large_run(folder: Path, *, size: int, shards: int) -> dict[str, Any]:
    """Seconds and bytes of a start that finds a run of `size` bytes and `shards` shards complete."""
    from exalign.data.synthetic import write_world
    from exalign.run.demo import RECIPE

    write_world(folder / "world", num_sft=64, num_prompts=24, num_test=12)
    names = {"tokenizer": "tokenizer", "data.sft": "sft.jsonl", "data.prompts": "prompts.jsonl"}
    names["data.evaluation"] = "test.jsonl"
    sources = [f"{name}.source={folder / 'world' / file}" for name, file in names.items()]
    command = [TARGET, str(RECIPE), *sources, *SMALL, "--run", str(folder / "run")]
    subprocess.run([sys.executable, "-m", "exalign", *command], check=True, capture_output=True)
    _inflate(folder / "run", size=size, shards=shards)
    found = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _START, *command], check=True, capture_output=True, text=True)
        assert "▸" not in done.stdout, done.stdout
        found.append({**json.loads(done.stdout.splitlines()[-1]), "with_imports": time.perf_counter() - began})
    files = [path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file()]
    return {"run_bytes": sum(files), "run_files": len(files), **min(found, key=lambda one: one["seconds"])}


def _inflate(run: Path, *, size: int, shards: int) -> None:
    """Make models and samples large, as if their stages had written them so."""
    models = sorted(run.rglob("*.safetensors"))
    for path in models:
        os.truncate(path, size // len(models))
    shard = next((run / "rollouts").rglob("part-000000.parquet"))
    for number in range(1, shards):
        (shard.parent / f"part-{number:06d}.parquet").write_bytes(shard.read_bytes())
    for done in run.rglob("done.json"):
        values = read_sealed(done)
        files = {**values["files"]}
        if done.parent == run / "rollouts":
            files |= {
                path.relative_to(done.parent).as_posix(): (0, 0, "0" * 64) for path in shard.parent.glob("part-*")
            }
        values["files"] = {name: stamp(done.parent / name, known=digest) for name, (*_, digest) in files.items()}
        write_sealed(done, values)


def writing(folder: Path, counts: list[int]) -> dict[str, Any]:
    """Seconds to write so many shards of one record each, and to open the folder again before its header is there."""
    points = []
    for count in counts:
        place = folder / f"records-{count}"
        began = time.perf_counter()
        with RecordWriter(place, shard_size=1) as writer:
            for number in range(count):
                writer.write(Record(str(number), "Hi", (Completion("there"),)))
        written = time.perf_counter()
        assert RecordWriter(place, shard_size=1).written == count
        opened = time.perf_counter()
        writer.close(Header())
        closed = time.perf_counter()
        assert read_header(place).version
        points.append({"shards": count, "write": written - began, "open": opened - written, "close": closed - opened})
    return {"points": points, "slope": _slope([(point["shards"], point["write"]) for point in points])}


def _slope(points: list[tuple[float, float]]) -> float:
    """Least squares on log axes."""
    xs, ys = ([math.log(point[place]) for point in points] for place in (0, 1))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--size", type=float, default=200e9, help="bytes of the run")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="exalign-start-") as name:
        counts = [arguments.shards // 8, arguments.shards // 4, arguments.shards // 2, arguments.shards]
        found = {"writing": writing(Path(name), counts)}
        found["start"] = start_of_a_large_run(Path(name), size=int(arguments.size), shards=arguments.shards)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
