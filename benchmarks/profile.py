"""Where the time of exalign's step goes: `python -m benchmarks.profile --shape tldr --k 4`.

The terms of a step above 3 % by torch's profiler, each said to be necessary work or not. Products that were made twice
(the logits of a tile that did not fit in memory) are found by counting: operations done minus operations needed.
"""

from __future__ import annotations

import json
import math
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Exalign, copy_of
from benchmarks.workload import (
    SHAPES,
    argument_parser,
    describe_machine,
    make_config,
    make_groups,
    make_model,
    prepare_process,
    with_reference,
)
from exalign.models.flops import necessary_positions, training_flops

SHOWN = 0.03
NECESSARY = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "_for_cpu_backward"),
    "softmax over the vocabulary": ("aten::exp_", "aten::exp", "aten::amax", "aten::sum", "aten::sub_", "aten::log"),
    "activation function": ("aten::gelu", "aten::gelu_backward", "aten::tanh", "aten::silu"),
    "norms": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "optimizer": ("aten::_fused_adamw_",),
    "gradient norm and clipping": ("aten::_foreach_norm", "aten::_foreach_mul_", "aten::linalg_vector_norm"),
    "embeddings, picked rows": ("aten::index_add_", "aten::index", "aten::index_select", "aten::embedding"),
    "residual sums and bias gradients": ("aten::add", "aten::add_", "aten::sum_to_size"),
}
"""Kernels by term of necessary work. `aten::sum` is the softmax's and the bias gradients'."""

UNNECESSARY = {
    "copies": ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"),
    "joining and cutting": ("aten::cat", "aten::split", "aten::stack"),
    "filling": ("aten::zero_", "aten::fill_", "aten::zeros", "aten::new_zeros"),
}


def run(shape: str, k: int, *, model: str, prompts: int, token_budget: int) -> dict[str, Any]:
    """Profile one step after a warm-up."""
    plain = make_model(make_config(model))
    groups = make_groups(shape, prompts=prompts, k=k, vocabulary=plain.config.vocab_size)
    groups = with_reference(groups, copy_of(plain))
    contender = Exalign(plain, groups)
    for _ in range(2):
        contender.gradient(groups, token_budget)
        contender.update()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        contender.gradient(groups, token_budget)
        contender.update()
    events = found.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    seconds: dict[str, float] = {}
    kernels: dict[str, dict[str, float]] = {}
    for event in events:
        term, _ = classify(event.key)
        seconds[term] = seconds.get(term, 0.0) + event.self_cpu_time_total
        kernels.setdefault(term, {})[event.key] = event.self_cpu_time_total / total
    done = sum(_operations(event) for event in found.key_averages(group_by_input_shape=True))
    attention = 3 * 4.0 * necessary_positions(groups).pairs * plain.config.n_embd * plain.config.n_layer
    repeated = max(0.0, 1 - (training_flops(plain, groups) - attention) / done)
    products = seconds.pop("matrix products", 0.0)
    shares = {term: value / total for term, value in seconds.items()}
    shares["matrix products"] = products / total * (1 - repeated)
    shares["matrix products made twice"] = products / total * repeated
    terms = [
        {
            "term": term,
            "share": share,
            "necessary": term in NECESSARY,
            "kernels": dict(sorted(kernels.get(term, {}).items(), key=lambda item: -item[1])[:4]),
        }
        for term, share in sorted(shares.items(), key=lambda item: -item[1])
    ]
    about = {"benchmark": "profile", "shape": shape, "k": k, "model": model, "prompts": prompts}
    return {**about, "token_budget": token_budget, "machine": describe_machine(), "terms": terms}


def classify(kernel: str) -> tuple[str, bool]:
    """The term that a kernel belongs to, and whether the term is necessary work.

    >>> classify("aten::mm"), classify("aten::copy_"), classify("PackedPolicy.forward")
    (('matrix products', True), ('copies', False), ('everything else', False))
    """
    for necessary, terms in ((True, NECESSARY), (False, UNNECESSARY)):
        for term, names in terms.items():
            if any(kernel == name or (name.startswith("_") and kernel.endswith(name)) for name in names):
                return term, necessary
    return "everything else", False


def _operations(event: Any) -> float:
    """Operations of all calls of a matrix product with these shapes: 2 m k n each."""
    if event.key not in NECESSARY["matrix products"]:
        return 0.0
    left, right = event.input_shapes[1:3] if "addmm" in event.key else event.input_shapes[:2]
    return 2.0 * event.count * math.prod(left) * right[-1]


def show(result: dict[str, Any]) -> str:
    lines = [f"profile, {result['shape']}, K = {result['k']}, {result['prompts']} prompts: terms above {SHOWN:.0%}"]
    for row in result["terms"]:
        if row["share"] >= SHOWN:
            mark = "necessary" if row["necessary"] else "NOT NECESSARY"
            kernels = ", ".join(f"{name} {share:.1%}" for name, share in row["kernels"].items() if share > 0.003)
            lines.append(f"{row['share']:>6.1%}  {row['term']:34}{mark:15}{kernels}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, default="tldr", help="mean lengths")
    parser.add_argument("--k", type=int, default=4, help="completions per prompt")
    parser.add_argument("--prompts", type=int, default=12, help="prompts of the step")
    parser.add_argument("--token-budget", type=int, default=1536, help="tokens of a micro-batch")
    given = parser.parse_args(arguments)
    prepare_process(given.threads)
    result = run(given.shape, given.k, model=given.model, prompts=given.prompts, token_budget=given.token_budget)
    print(json.dumps(result) if given.json else show(result))


if __name__ == "__main__":
    main()
