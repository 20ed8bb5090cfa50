"""One optimizer step of EXO: `python -m benchmarks.step --shape tldr --k 8 --json`.

All contenders start from the same weights and see the same tokens. First each makes one pass, whose loss and gradient
must be exalign's, or the run ends; then they take turns. Each uses the fastest of several micro-batch sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Exalign, Official, copy_of, gradient_of
from benchmarks.timing import fastest_of, interleave, timed
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
from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.models.flops import matmul_peak, training_flops

TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1}
"""Largest |gradient − exalign's| over |exalign's|, as norms, and the same of the loss; fp32 is exact to rounding."""

NAMES = ("exalign", "trl-best", "trl-completions", "official", "trl-defaults", "exalign-bf16")


def make_contender(name: str, model: Any, groups: Sequence[Group], reference: Any) -> Contender:
    """One of `NAMES`, ready for its first step."""
    if name == "exalign":
        return Exalign(model, groups)
    if name == "exalign-bf16":
        return Exalign(model, groups, precision="bf16")
    if name == "official":
        return Official(model, groups, reference)
    from benchmarks.trl_peers import BEST_OPTIONS, DEFAULTS, TrlStep

    if name == "trl-best":
        return TrlStep("TRL, best shipped options", model, groups, BEST_OPTIONS)
    if name == "trl-completions":
        return TrlStep("TRL, head on completions only", model, groups, BEST_OPTIONS, completions_only=True)
    if name == "trl-defaults":
        live = copy_of(reference).eval()
        return TrlStep("TRL, defaults", model, groups, DEFAULTS, live_reference=live, by_length=False)
    raise InputError(f"There is no contender {name!r}; there are {', '.join(NAMES)}.")


def compare(
    shape: str, k: int, *, model: str, prompts: int, names: Sequence[str], rounds: int, seconds_each: float
) -> dict[str, Any]:
    """Check that all contenders compute the same, then time them in turns; a difference is an `InputError`."""
    config = make_config(model)
    policy = make_model(config)
    reference = make_reference(policy)
    groups = with_reference(
        make_groups(shape, prompts=prompts, k=k, vocabulary=config.vocab_size), copy_of(reference).eval()
    )
    contenders, sizes, first, differences = {}, {}, {}, {}
    expected: tuple[float, Tensor] | None = None
    for name in names:
        contender = contenders[name] = make_contender(name, policy, groups, reference)
        sizes[name] = _best_size(contender, groups)
        found: list[float] = []
        first[name] = timed(lambda: found.append(contender.gradient(groups, sizes[name])))  # noqa: B023
        gradient = gradient_of(contender.model)
        if expected is None:
            expected = found[0], gradient
        differences[name] = _difference(contender, (found[0], gradient), expected)
        del gradient
        first[name] += timed(contender.update)
    steps = {name: _step(contender, groups, sizes[name]) for name, contender in contenders.items()}
    before = _peaks(policy)
    times = interleave(steps, first, rounds=rounds, seconds_each=seconds_each)
    peaks = {precision: max(rate, before[precision]) for precision, rate in _peaks(policy).items()}
    work, tokens = training_flops(policy, groups), sum(group.num_tokens for group in groups)
    base = times[names[0]].median
    rows = {
        name: {
            "label": contender.label,
            "precision": contender.precision,
            "micro_batch": f"{sizes[name]} {contender.unit}",
            **times[name].summary(),
            "ratio": times[name].median / base,
            "tokens_per_second": tokens / times[name].median,
            "gflops": work / times[name].median / 1e9,
            "share_of_peak": work / times[name].median / peaks[contender.precision],
            "difference": differences[name],
        }
        for name, contender in contenders.items()
    }
    about = {"benchmark": "step", "shape": shape, "k": k, "model": model, "prompts": prompts, "tokens": tokens}
    gflops = {precision: rate / 1e9 for precision, rate in peaks.items()}
    return {**about, "peak_gflops": gflops, "machine": describe_machine(), "contenders": rows}


def _peaks(model: Any) -> dict[str, float]:
    """The best rate of the model's matrix products now, by precision."""
    return {"fp32": matmul_peak(model), "bf16": matmul_peak(model, dtype=torch.bfloat16)}


def _best_size(contender: Contender, groups: Sequence[Group]) -> int:
    """The fastest micro-batch size, gradients thrown away; peers, which take longer, are tried on fewer prompts."""
    few = groups[: max(contender.sizes)] if contender.unit == "prompts" else groups
    if len(contender.sizes) > 1:
        contender.gradient(few[:1], contender.sizes[0])  # what the first call allocates is not the first size's fault
    best = fastest_of({size: lambda size=size: contender.gradient(few, size) for size in contender.sizes})  # type: ignore[misc]
    contender.model.zero_grad(set_to_none=True)
    return best


def _difference(contender: Contender, found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> dict[str, float]:
    loss = abs(found[0] - expected[0]) / max(abs(expected[0]), 1e-6)
    gradient = float((found[1] - expected[1]).norm() / expected[1].norm())
    limit = TOLERANCE[contender.precision]
    if not (loss <= limit and gradient <= limit):
        raise InputError(
            f"{contender.label} does not compute what exalign computes (loss off by {loss:.1e}, gradient by "
            f"{gradient:.1e} of its size); nothing was timed."
        )
    return {"loss": loss, "gradient": gradient}


def _step(contender: Contender, groups: Sequence[Group], micro: int) -> Callable[[], None]:
    def step() -> None:
        contender.gradient(groups, micro)
        contender.update()

    return step


def show(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    lines = [
        f"step, {result['shape']}, K = {result['k']}, {result['prompts']} prompts, {result['tokens']} tokens, "
        f"peak {result['peak_gflops']['fp32']:.0f} GFLOP/s in fp32, {result['peak_gflops']['bf16']:.0f} in bf16",
        f"{'':34}{'precision':>10}{'micro-batch':>16}{'n':>4}{'seconds':>10}{'ratio':>8}{'peak':>7}",
    ]
    for row in result["contenders"].values():
        lines.append(
            f"{row['label']:34}{row['precision']:>10}{row['micro_batch']:>16}{row['n']:>4}{row['seconds']:>10.3f}"
            f"{row['ratio']:>8.2f}{row['share_of_peak']:>7.0%}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, default="tldr", help="mean lengths")
    parser.add_argument("--k", type=int, default=2, help="completions per prompt")
    parser.add_argument("--prompts", type=int, default=12, help="prompts of the step")
    parser.add_argument("--contenders", default=",".join(NAMES), help="the first is what the others are divided by")
    parser.add_argument("--rounds", type=int, default=5, help="most passes of each after the compared one")
    parser.add_argument("--seconds-each", type=float, default=30, help="a contender that took as long rests")
    given = parser.parse_args(arguments)
    prepare_process(given.threads)
    result = compare(
        given.shape,
        given.k,
        model=given.model,
        prompts=given.prompts,
        names=given.contenders.split(","),
        rounds=given.rounds,
        seconds_each=given.seconds_each,
    )
    print(json.dumps(result) if given.json else show(result))


if __name__ == "__main__":
    main()
