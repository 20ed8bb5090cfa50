"""How the cost of exalign's step grows: `python -m benchmarks.sweep --json`.

One of K, prompt length, completion length, vocabulary and prompts goes up eightfold while the others stay. The slope is
that of log(seconds) over log(value): 1 is proportional, below 1 is shared work. The slope of the necessary work stands
beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.contenders import Exalign, copy_of
from benchmarks.timing import interleave, timed
from benchmarks.workload import (
    argument_parser,
    describe_machine,
    make_config,
    make_groups,
    make_model,
    prepare_process,
    with_reference,
)
from exalign.models.flops import training_flops


@dataclass(frozen=True)
class Point:
    """What one step works on; all rows have these very lengths."""

    k: int = 4
    prompt: int = 128
    completion: int = 32
    vocabulary: int = 16384
    prompts: int = 8


SWEEPS: dict[str, tuple[int, ...]] = {
    "k": (2, 4, 8, 16),
    "prompt": (100, 200, 400, 800),
    "completion": (16, 32, 64, 128),
    "vocabulary": (8192, 16384, 32768, 65536),
    "prompts": (2, 4, 8, 16),
}
TOKEN_BUDGET = 1536


def sweep(name: str, *, model: str, rounds: int, scale: int = 1) -> dict[str, Any]:
    """Seconds and necessary work at each value of one dimension; `scale` divides all others' lengths, for tests."""
    base = Point(prompt=128 // scale, completion=max(2, 32 // scale), vocabulary=16384 // scale)
    points = [replace(base, **{name: value if name in ("k", "prompts") else value // scale}) for value in SWEEPS[name]]
    work, first, flops = {}, {}, {}
    for point in points:
        plain = make_model(make_config(model, vocabulary=point.vocabulary))
        shape = (point.prompt, point.completion)
        groups = make_groups(shape, prompts=point.prompts, k=point.k, vocabulary=point.vocabulary, fixed_lengths=True)
        groups = with_reference(groups, copy_of(plain))
        contender, value = Exalign(plain, groups), str(getattr(point, name))

        def step(contender: Exalign = contender, groups: list[Any] = groups) -> None:
            contender.gradient(groups, TOKEN_BUDGET)
            contender.update()

        work[value], first[value], flops[value] = step, timed(step), training_flops(plain, groups)
    times = interleave(work, first, rounds=rounds, seconds_each=math.inf)
    rows = [{"value": int(value), **times[value].summary(), "gflop": flops[value] / 1e9} for value in work]
    values = [float(row["value"]) for row in rows]
    return {
        "dimension": name,
        "others": {key: value for key, value in asdict(base).items() if key != name},
        "points": rows,
        "slope": slope(values, [float(row["seconds"]) for row in rows]),
        "work_slope": slope(values, [float(row["gflop"]) for row in rows]),
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y over log x.

    >>> round(slope([1, 2, 4, 8], [3, 12, 48, 192]), 6)
    2.0
    """
    logs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((a - mean_x) * (b - mean_y) for a, b in logs) / sum((a - mean_x) ** 2 for a, _ in logs)


def show(result: dict[str, Any]) -> str:
    lines = []
    for found in result["sweeps"]:
        lines.append(
            f"{found['dimension']}: slope {found['slope']:.2f}, of the necessary work {found['work_slope']:.2f}"
        )
        lines += [
            f"{point['value']:>10}{point['seconds']:>10.3f} s{point['gflop']:>12.1f} GFLOP" for point in found["points"]
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--dimensions", default=",".join(SWEEPS), help="which ones to sweep")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each point after the first")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths and vocabularies by this")
    given = parser.parse_args(arguments)
    prepare_process(given.threads)
    sweeps = [
        sweep(name, model=given.model, rounds=given.rounds, scale=given.scale) for name in given.dimensions.split(",")
    ]
    result = {"benchmark": "sweep", "model": given.model, "machine": describe_machine(), "sweeps": sweeps}
    print(json.dumps(result) if given.json else show(result))


if __name__ == "__main__":
    main()
