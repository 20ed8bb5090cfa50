"""Peak memory of one optimizer step: `python -m benchmarks.memory --shape tldr --k 8 --json`.

Each contender runs in a process of its own. Counted is what the step needs above weights, gradients and optimizer
state: the highest resident memory during the step, minus the resident memory before it with all of those allocated. A
reference model that the contender keeps is added, because a cached reference needs none.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import copy_of
from benchmarks.step import NAMES, make_contender
from benchmarks.workload import (
    SHAPES,
    argument_parser,
    describe_machine,
    make_config,
    make_groups,
    make_model,
    make_reference,
    prepare_process,
    with_reference,
)
from exalign.errors import InputError

CONTENDERS = "exalign,trl-best,trl-best:4,trl-completions,trl-completions:4,official,trl-defaults"
KEEPS_REFERENCE = ("official", "trl-defaults")


def measure(name: str, shape: str, k: int, *, model: str, prompts: int, micro: int) -> dict[str, Any]:
    """Bytes of one contender, in this process, which should be fresh."""
    config = make_config(model)
    policy = make_model(config)
    reference = make_reference(policy)
    groups = with_reference(make_groups(shape, prompts=prompts, k=k, vocabulary=config.vocab_size), copy_of(reference))
    contender = make_contender(name, policy, groups, reference)
    size = micro or contender.sizes[0]
    tiny = with_reference(make_groups((4, 2), prompts=1, k=k, vocabulary=config.vocab_size), copy_of(reference))
    contender.gradient(tiny, size)
    contender.update()  # allocates the optimizer's state
    for parameter in contender.model.parameters():
        parameter.grad = torch.ones_like(parameter).zero_()  # written to, so that its pages are there
    _settle()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    contender.gradient(groups, size)
    contender.update()
    peak = _status("VmHWM")
    kept = sum(p.numel() * p.element_size() for p in reference.parameters()) if name in KEEPS_REFERENCE else 0
    return {
        "label": contender.label,
        "micro_batch": f"{size} {contender.unit}",
        "bytes": peak - before + kept,
        "state_bytes": 4 * sum(p.numel() * p.element_size() for p in contender.model.parameters()),
    }


def compare(shape: str, k: int, *, model: str, prompts: int, names: list[str], threads: int) -> dict[str, Any]:
    """All contenders, each in a fresh process. `name:4` asks for a micro-batch size; else it is the smallest."""
    rows = {}
    for name in names:
        one, _, micro = name.partition(":")
        command = [sys.executable, "-m", "benchmarks.memory", "--one", one, "--shape", shape, "--k", str(k)]
        command += ["--micro", micro or "0"]
        command += ["--model", model, "--prompts", str(prompts), "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise InputError(f"Measuring {name} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    base = rows[names[0]]["bytes"]
    for row in rows.values():
        row["ratio"] = row["bytes"] / base
    about = {"benchmark": "memory", "shape": shape, "k": k, "model": model, "prompts": prompts}
    return {**about, "machine": describe_machine(), "contenders": rows}


def _settle() -> None:
    """Give freed memory back to the system, so that it does not hide a peak."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise InputError(f"This system does not say {name}; memory is measured on Linux.")


def show(result: dict[str, Any]) -> str:
    lines = [f"memory, {result['shape']}, K = {result['k']}, {result['prompts']} prompts", ""]
    for row in result["contenders"].values():
        lines.append(f"{row['label']:34}{row['micro_batch']:>16}{row['bytes'] / 1e6:>12,.0f} MB{row['ratio']:>8.1f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, default="tldr", help="mean lengths")
    parser.add_argument("--k", type=int, default=2, help="completions per prompt")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of the step; the peak is that of a micro-batch")
    parser.add_argument("--contenders", default=CONTENDERS, help="the first is the base; name:size sets micro-batch")
    parser.add_argument("--micro", type=int, default=0, help="micro-batch size, with --one; 0: the smallest")
    parser.add_argument("--one", choices=NAMES, help="measure this one in this very process")
    given = parser.parse_args(arguments)
    prepare_process(given.threads)
    shape = {"model": given.model, "prompts": given.prompts}
    if given.one:
        print(json.dumps(measure(given.one, given.shape, given.k, micro=given.micro, **shape)))
        return
    result = compare(given.shape, given.k, names=given.contenders.split(","), threads=given.threads, **shape)
    print(json.dumps(result) if given.json else show(result))


if __name__ == "__main__":
    main()
