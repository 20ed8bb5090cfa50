"""The first minutes on a GPU: `python -m benchmarks.gpu --json OUT`, at most 9 of them; installs nothing.

Part by part: does it compute what the CPU computes (`parity`, `kernel`, `stages`), how fast (`step`, `sample`), and
where the time goes (`profile`). Each part runs in a process of its own and has a share of the minutes that are left.
OUT is written after every cell, so that the same command goes on where it was stopped. What failed stands there with
its message and is tried again last; a peer that is not installed is said. `python -m benchmarks.tables OUT` writes the
tables of docs/performance.md. `--size tiny` is all of it in minutes on a CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing.util
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.contenders import Exalign, exo_loss, gradient_of
from benchmarks.sample import ExalignSampling, Generate, Sampling, VLLMSampling, as_groups
from benchmarks.timing import fastest_of, interleave, timed
from benchmarks.workload import SHAPES, describe_machine, make_groups, prepare_process, with_reference
from exalign.data.batching import Group
from exalign.device import device
from exalign.models import attention
from exalign.models.flops import forward_flops, matmul_peak, training_flops
from exalign.models.logprobs import PackedPolicy, completion_logprobs
from exalign.models.memory import release_memory
from exalign.models.prefix_tree import padded_rows, policy_stream
from exalign.storage import read_json, write_json

MINUTES = 9.0
Row = dict[str, Any]
Cells = dict[str, Callable[[], list[Row]]]
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "GPT-2": {"model_type": "gpt2", "n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 1024},
    "Pythia": LLAMA | {"model_type": "gpt_neox"},
    "Mistral, windows": LLAMA | {"model_type": "mistral", "sliding_window": 48},
    "Gemma 2, windows and caps": LLAMA | {"model_type": "gemma2", "sliding_window": 48, "query_pre_attn_scalar": 64},
}
MODELS: dict[str, dict[str, Any]] = {
    "135M": LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "1.4B": {
        "model_type": "gpt_neox", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 16, "vocab_size": 50304,
    },
    "tiny": ARCHITECTURES["GPT-2"] | {"n_embd": 32, "n_head": 2, "vocab_size": 211},
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What is measured: `models` with the prompts of a step and of a draw; `kernels` with the trees of a row."""

    models: dict[str, tuple[int, int]]
    shapes: tuple[str, ...]
    ks: tuple[int, ...]
    budgets: tuple[int, ...]
    kernels: dict[str, tuple[tuple[int, int, int], int | None, float | None]]
    trees: int
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    stages: tuple[str, ...] = ()
    parity: str | tuple[int, int] = (150, 40)
    rounds: int = 5


KERNELS: dict[str, tuple[tuple[int, int, int], int | None, float | None]] = {
    "135M": ((9, 3, 64), None, None),
    "1.4B": ((16, 16, 128), None, None),
    "Llama 8B": ((32, 8, 128), None, None),
    "Gemma 2": ((8, 4, 256), None, 50.0),
    "Gemma 2, window": ((8, 4, 256), 128, 50.0),
}
SIZES = {
    "card": Size({"135M": (64, 64), "1.4B": (16, 64)}, ("tldr", "hh", "imdb"), (4, 2, 8), (8192, 32768), KERNELS, 16),
    "tiny": Size(
        {"tiny": (4, 2)}, ("tiny",), (2,), (64, 128), {"tiny": ((2, 1, 16), 8, 5.0)}, 2,
        ("Llama",), ("lora",), "tiny", 1,
    ),
}  # fmt: skip


def parity(size: Size) -> Cells:
    """Log-probabilities and gradients against the CPU's in float32."""
    pairs = [(name, precision) for precision in ("fp32", "bf16") for name in size.architectures]
    return {f"{name}, {precision}": partial(_parity, name, precision, size.parity) for name, precision in pairs}


def _parity(name: str, precision: str, shape: str | tuple[int, int]) -> list[Row]:
    model = make_random(ARCHITECTURES[name], torch.device("cpu"))
    groups = make_groups(shape, prompts=4, k=3, vocabulary=model.config.vocab_size)
    there = deepcopy(model).to(device())
    logp, gradient = _logp_and_gradient(model, groups, "fp32")
    found, found_gradient = _logp_and_gradient(there, groups, precision)
    lengths = torch.tensor([[len(ids) for ids in group.completion_ids] for group in groups])
    off = {
        "nats per token off, at most": float(((found - logp).abs() / lengths).max()),
        "gradient off, of its norm": float((found_gradient - gradient).norm() / gradient.norm()),
    }
    return [{"architecture": name, "precision": precision, **off}]


def _logp_and_gradient(model: Any, groups: Sequence[Group], precision: str) -> tuple[Tensor, Tensor]:
    policy = PackedPolicy(model.train())
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logp = completion_logprobs(policy, groups, temperature=1.0)
    logp.mean().backward()
    return logp.detach().float().cpu(), gradient_of(model).cpu()


def kernel(size: Size) -> Cells:
    """FlexAttention in bf16 at sizes of use: against its dense twin, and its time beside flash attention's on rows."""
    return {name: partial(_kernel, name, *how, size.trees) for name, how in size.kernels.items()}


def _kernel(name: str, heads: tuple[int, int, int], window: int | None, softcap: float | None, trees: int) -> list[Row]:
    queries, keys, width = heads
    groups = make_groups("tldr" if trees > 2 else "tiny", prompts=trees, k=8, vocabulary=99)
    stream, _ = policy_stream(groups, device(), windows=(window,))
    layout, rows = stream.layout.with_window(window), padded_rows(groups, device())[0]
    how: dict[str, Any] = {"scale": width**-0.5, "softcap": softcap}

    def states(number: int, length: int) -> list[Tensor]:
        made = [torch.randn(number, n, length, width, dtype=torch.bfloat16) for n in (queries, keys, keys)]
        return [one.to(device()).requires_grad_() for one in made]

    packed, padded = states(1, layout.num_tokens), states(*rows.shape)

    def dense() -> list[Tensor]:
        key, value = (attention.repeat_heads(one, queries) for one in packed[1:])
        out = attention.dense_tree_attention(packed[0], key, value, layout, **how)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), packed)]

    def flex() -> list[Tensor]:
        out = attention.flex_tree_attention(*packed, layout, **how)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), packed)]

    def flash() -> None:
        out = scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=keys != queries)
        torch.autograd.grad(out.float().square().sum(), padded)

    if device().type == "cpu":  # torch has no FlexAttention with a backward pass for it, and it is not used there
        flex = dense
    compiling, pairs = timed(flex), zip(flex(), dense(), strict=True)
    off = [float((ours - theirs).float().norm() / theirs.float().norm()) for ours, theirs in pairs]
    times = _medians({"FlexAttention": flex, "dense twin": dense, "flash attention on padded rows": flash}, 5.0)
    about = {"heads": f"{name}: {queries}/{keys} × {width}", "window": window, "soft cap": softcap}
    about |= {"tokens": layout.num_tokens, "compiling, s": compiling, "output off": off[0], "gradients off": max(off)}
    return [about | {f"{way}, ms": 1000 * seconds for way, seconds in times.items()}]


def _medians(ways: dict[str, Callable[[], object]], seconds_each: float) -> dict[str, float]:
    """Median seconds of each way, in turns; what the first pass compiles is not among them."""
    first = {name: timed(work) for name, work in ways.items()}
    return {name: t.median for name, t in interleave(ways, first, rounds=3, seconds_each=seconds_each).items()}


def make_random(config: dict[str, Any], where: torch.device) -> Any:
    """A model of this config with random weights, without dropout and with nothing that ends a completion."""
    torch.manual_seed(0)
    ends: dict[str, Any] = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    silent = {name: 0.0 for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop") if config["model_type"] == "gpt2"}
    with where:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | ends | silent)).to(where).eval()


_held: dict[str, Any] = {}


def model_of(name: str) -> Any:
    """The model on the device; one at a time is held."""
    if name not in _held:
        _held.clear()
        release_memory()
        _held[name] = make_random(MODELS[name], device())
    return _held[name]


class Plain:
    """The plain way: a padded row for each completion, causal flash attention, all logits; the model is exalign's."""

    unit = "prompts"

    def __init__(self, ours: Exalign, groups: Sequence[Group], tokens: int) -> None:
        self.ours, self.model, self.update = ours, ours.model, ours.update
        row = max(len(group.prompt_ids) + max(map(len, group.completion_ids)) for group in groups)
        fitting = max(1, tokens // (row * groups[0].num_completions))
        self.sizes = tuple(sorted({max(1, fitting // 4), fitting}))

    def gradient(self, groups: Sequence[Group], micro: int) -> float:
        total = torch.zeros((), device=device())
        for begin in range(0, len(groups), micro):
            part = groups[begin : begin + micro]
            input_ids, _, wanted = padded_rows(part, device())
            with self.ours.accelerator.autocast():  # padding stands behind, so that causal attention needs no mask
                logits = self.model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)
            logp = logits.float().log_softmax(-1)[wanted.positions, wanted.targets]
            flat = logp.new_zeros(len(part) * part[0].num_completions).index_add(0, wanted.places, logp)
            reference = torch.stack([g.reference_logp for g in part if g.reference_logp is not None]).to(device())
            loss = exo_loss(flat.view(len(part), -1), reference, part).sum() / len(groups)
            loss.backward()
            total += loss.detach()
        return float(total)


def step(size: Size) -> Cells:
    """A whole step of EXO in bf16: exalign, the plain way on the same weights, and TRL's where it is installed."""
    cells = [(name, shape, k) for name in size.models for k in size.ks for shape in size.shapes]
    return {f"{name}, {shape}, K = {k}": partial(_step, name, shape, k, size) for name, shape, k in cells}


def _step(name: str, shape: str, k: int, size: Size) -> list[Row]:
    model, about = model_of(name), {"model": name, "shape": shape, "K": k}
    groups = make_groups(shape, prompts=size.models[name][0], k=k, vocabulary=model.config.vocab_size)
    groups = with_reference(groups, model)
    ours = Exalign(model, groups, precision="bf16", copied=False)
    ours.sizes = size.budgets
    ways: dict[str, Any] = {"exalign": ours, "padded rows": Plain(ours, groups, size.budgets[-1])}
    if find_spec("trl") and device().type in ("cpu", "cuda"):  # its trainer knows no other
        from benchmarks.trl_peers import TrlStep

        ways["TRL"] = TrlStep("TRL", model, groups, {"bf16": True, "gradient_checkpointing": False})
    steps, found = {}, {}
    for way, contender in ways.items():
        first = timed(partial(contender.gradient, groups[:1], contender.sizes[0]))  # compiles, allocates
        micro = fastest_of({one: partial(contender.gradient, groups, one) for one in contender.sizes})
        contender.model.zero_grad(set_to_none=True)
        loss, memory = _with_peak_memory(partial(contender.gradient, groups, micro))
        contender.update()
        steps[way] = partial(_whole_step, contender, groups, micro)
        found[way] = {"micro-batch": f"{micro} {contender.unit}", "first pass, s": first, "loss": loss}
        found[way] |= {"memory above state, GB": memory}
    times = interleave(steps, dict.fromkeys(ways, 0.0), rounds=size.rounds, seconds_each=4.0)
    peak, work = matmul_peak(model, dtype=torch.bfloat16), training_flops(model, groups)
    tokens, base = sum(group.num_tokens for group in groups), times["exalign"].median
    rows = []
    for way, entry in times.items():
        speed = {"step, s": entry.median, "n": len(entry.counted), "exalign = 1": entry.median / base}
        speed |= {"tokens/s": tokens / entry.median, "share of peak": work / entry.median / peak}
        rows.append(about | {"way": way} | speed | found[way])
    return rows if "TRL" in ways else [*rows, about | {"way": "TRL: not installed"}]


def _whole_step(contender: Any, groups: Sequence[Group], micro: int) -> None:
    contender.gradient(groups, micro)
    contender.update()


def _with_peak_memory(work: Callable[[], float]) -> tuple[float, float | None]:
    """What the work gives, and the GB that it held above what was held before; None where the device does not say."""
    if device().type != "cuda":
        return work(), None
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return work(), float(torch.cuda.max_memory_allocated() - before) / 1e9


def sample(size: Size) -> Cells:
    """K = 4 completions of TL;DR's lengths in bf16: exalign's sampler, `generate`, and vLLM where it is installed."""
    return {name: partial(_sample, name, size) for name in size.models}


def _sample(name: str, size: Size) -> list[Row]:
    model, k, shape, prompts = deepcopy(model_of(name)).to(torch.bfloat16), 4, size.shapes[0], size.models[name][1]
    tokens, about = SHAPES[shape][1], {"model": name, "shape": shape, "K": k, "prompts": prompts}
    groups = make_groups(shape, prompts=prompts, k=k, vocabulary=model.config.vocab_size)
    ways: dict[str, Sampling] = {"exalign": ExalignSampling("exalign", model, k, tokens)}
    ways["generate"] = Generate("generate", model, k, tokens)
    if find_spec("vllm"):
        ways["vLLM"] = VLLMSampling("vLLM", model, k, tokens)
    draws = {way: partial(sampling.draw, groups, prompts * k) for way, sampling in ways.items()}
    flops = forward_flops(model, as_groups(groups, ways["exalign"].draw(groups, prompts * k)))
    peak, times, rows = matmul_peak(model), _medians(draws, 15.0), []  # type: ignore[arg-type]
    for way, seconds in times.items():
        speed = {"draw, s": seconds, "tokens/s": prompts * k * tokens / seconds}
        speed |= {"exalign = 1": seconds / times["exalign"], "share of peak": flops / seconds / peak}
        rows.append(about | {"way": way} | speed)
    return rows if "vLLM" in ways else [*rows, about | {"way": "vLLM: not installed"}]


def profiled(size: Size) -> Cells:
    """The kernels that take most of a step of EXO at K = 4, and how long the device has nothing to do."""
    return {f"{name}, {shape}": partial(_profile, name, shape, size) for name in size.models for shape in size.shapes}


def _profile(name: str, shape: str, size: Size) -> list[Row]:
    model, about, on_card = model_of(name), {"model": name, "shape": shape}, device().type == "cuda"
    groups = make_groups(shape, prompts=size.models[name][0], k=4, vocabulary=model.config.vocab_size)
    groups = with_reference(groups, model)
    work = partial(_whole_step, Exalign(model, groups, precision="bf16", copied=False), groups, size.budgets[-1])
    seconds = [timed(work) for _ in range(3)][-1]
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as found:
        timed(work)
    taken = {
        (event.key, event.count): float(event.self_device_time_total if on_card else event.self_cpu_time_total) / 1e6
        for event in found.key_averages()
    }
    rows = [
        about
        | {"kernel": "(nothing to do)", "share of the step": max(0.0, 1 - sum(taken.values()) / seconds), "calls": None}
    ]
    for kernel_name, calls in sorted(taken, key=lambda one: -taken[one])[:10]:
        share = taken[kernel_name, calls] / seconds
        rows.append(about | {"kernel": kernel_name[:80], "share of the step": share, "calls": calls})
    return rows


def stages(size: Size) -> Cells:
    """Every stage of a recipe at its smallest, as the tests have them: all its numbers against the CPU's."""
    tests = str(Path(__file__).parents[1] / "tests")
    sys.path += [] if tests in sys.path else [tests]
    from device import work

    wanted = size.stages or (*work.STAGES, *work.HALF)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_on_the_cpu, initargs=(sys.path,))
    multiprocessing.util.Finalize(pool, pool.shutdown, exitpriority=1)  # before this process waits for its children

    def compare(stage: str) -> list[Row]:
        expected = pool.submit(_numbers, stage)
        pairs = list(zip(_numbers(stage), expected.result(), strict=True))
        off = max(abs(ours - theirs) / max(1.0, abs(theirs)) for ours, theirs in pairs)
        return [{"stage": stage, "numbers": len(pairs), "off from the CPU's, at most": off}]

    return {stage: partial(compare, stage) for stage in wanted}


def _on_the_cpu(path: list[str]) -> None:
    sys.path[:] = path
    os.environ["ACCELERATE_USE_CPU"] = "1"
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)


def _numbers(stage: str) -> list[float]:
    from device.work import numbers_of

    with tempfile.TemporaryDirectory() as folder:
        return numbers_of(stage, Path(folder) / "stage")


PARTS: dict[str, tuple[float, Callable[[Size], Cells]]] = {
    "parity": (0.15, parity),
    "kernel": (0.12, kernel),
    "step": (0.3, step),
    "sample": (0.15, sample),
    "profile": (0.06, profiled),
    "stages": (0.22, stages),
}
"""Each part's share of the minutes, and its cells."""


def read(out: Path) -> dict[str, Any]:
    if out.exists():
        found: dict[str, Any] = read_json(out)
        return found
    machine = describe_machine() | {"device": str(device()), "cuda": torch.version.cuda}
    if device().type == "cuda":
        about = torch.cuda.get_device_properties(0)
        machine |= {"device": about.name, "device_gib": round(about.total_memory / 2**30)}
    return {"benchmark": "gpu", "machine": machine, "parts": {name: {} for name in PARTS}}


def run_part(name: str, out: Path, size: Size, seconds: float) -> None:
    """Its cells, those first that were never begun; none begins after so many seconds."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # a kernel that is not compiled, silently, measures nothing
    deadline, results = time.monotonic() + seconds, read(out)
    found, cells = results["parts"][name], PARTS[name][1](size)
    for cell in sorted((cell for cell in cells if "rows" not in found.get(cell, {})), key=lambda cell: cell in found):
        if time.monotonic() > deadline:
            break
        found[cell] = {"failed": "it did not end in its time"}
        write_json(out, results)
        started = time.monotonic()
        try:
            found[cell] = {"rows": cells[cell](), "seconds": round(time.monotonic() - started, 1)}
        except Exception as error:  # whatever it is belongs into the result; the other cells go on
            where = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-3:]]
            found[cell] = {"failed": f"{type(error).__name__}: {str(error)[:400]} ({', '.join(where)})"}
        write_json(out, results)
        print(f"{name}: {cell}: {found[cell].get('failed', 'done')}", flush=True)


def run(out: Path, size: str, minutes: float) -> str:
    """All parts, each in a process that is ended when its time is over; a sentence on what is not there yet."""
    deadline, left = time.monotonic() + 60 * minutes, sum(share for share, _ in PARTS.values())
    for name, (share, _) in PARTS.items():
        seconds = max(1.0, (deadline - time.monotonic()) * share / left)
        left -= share
        command = [sys.executable, "-m", "benchmarks.gpu", "--json", str(out), "--size", size]
        command += ["--part", name, "--seconds", f"{0.8 * seconds:.0f}"]
        try:
            subprocess.run(command, timeout=seconds, check=False, cwd=Path(__file__).parents[1])
        except subprocess.TimeoutExpired:
            print(f"{name}: its {seconds:.0f} s are over", flush=True)
    parts = read(out)["parts"]
    failed = [f"{name}: {cell}" for name, cells in parts.items() for cell, one in cells.items() if "failed" in one]
    unseen = [name for name, cells in parts.items() if not cells]
    return f"Failed, or not ended: {', '.join(failed) or 'none'}. Not begun: {', '.join(unseen) or 'none'}."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="the result; it goes on where that is")
    parser.add_argument("--size", choices=SIZES, default="card", help="tiny: all of it on a CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="nothing runs on after as many")
    parser.add_argument("--part", choices=PARTS, help="this part alone, in this process")
    parser.add_argument("--seconds", type=float, default=60.0, help="with --part: no cell begins after as many")
    given = parser.parse_args(arguments)
    prepare_process(torch.get_num_threads())
    if given.part:
        run_part(given.part, given.json.resolve(), SIZES[given.size], given.seconds)
    else:
        print(run(given.json.resolve(), given.size, given.minutes))


if __name__ == "__main__":
    main()
