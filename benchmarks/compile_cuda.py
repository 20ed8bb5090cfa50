"""What exalign runs on CUDA, compiled for it without a card: `make compile-cuda`.

FlexAttention is called as training and decoding call it, on tensors that have shapes and say that they are on CUDA.
Inductor lowers the call, forward and backward, and Triton compiles the kernels for the given architecture; what would
be launched is not. A row says how much shared memory the largest kernels need of what a block may have.

This shows that the kernels exist and fit. It shows nothing about their results or their speed. It needs PyPI's CUDA
build of torch, a C compiler for stand-ins of the driver's libraries, and no driver.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may have, by architecture (CUDA C++ programming guide, compute capabilities)."""
SHAPES: dict[str, tuple[int, int, int, int | None, float | None]] = {
    "Llama 3, Qwen3: 32/8 × 128": (32, 8, 128, None, None),
    "Gemma 2: 8/4 × 256, cap": (8, 4, 256, None, 50.0),
    "Gemma 2: 8/4 × 256, cap, window": (8, 4, 256, 64, 50.0),
    "GPT-NeoX: 32/32 × 80": (32, 32, 80, None, None),
    "GPT-2: 12/12 × 64": (12, 12, 64, None, None),
    "Qwen2: 14/2 × 64": (14, 2, 64, None, None),
    "Mistral: 32/8 × 128, window": (32, 8, 128, 64, None),
    "Gemma 1: 8/1 × 256": (8, 1, 256, None, None),
    "Phi, Cohere, Granite: 32/32 × 64": (32, 32, 64, None, None),
    "StableLM 2 of 12B: 32/8 × 160": (32, 8, 160, None, None),
    "the narrowest: 4/2 × 16": (4, 2, 16, None, None),
}
"""Query heads / heads of keys × their size, window and soft cap of the architectures that share prompts."""
USES = ("training", "reading", "decoding")
NOTHING = """
cuCtxGetCurrent cuCtxSetCurrent cuDeviceGet cuDeviceGetAttribute cuDevicePrimaryCtxRetain cuFuncGetAttribute
cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString cuInit cuLaunchCooperativeKernel cuLaunchKernel
cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuModuleGetFunction cuModuleLoad cuModuleLoadData cuModuleLoadDataEx
cuModuleUnload cuOccupancyMaxActiveBlocksPerMultiprocessor cuPointerGetAttribute cuTensorMapEncodeTiled"""
RUNTIME = """
cudaDeviceGetStreamPriorityRange cudaDeviceSynchronize cudaEventCreateWithFlags cudaEventDestroy
cudaEventQuery cudaEventRecord cudaFree cudaGetLastError cudaSetDevice cudaStreamQuery cudaStreamSynchronize
cudaStreamWaitEvent cudaThreadExchangeStreamCaptureMode cudaDeviceGetDefaultMemPool cudaStreamCreateWithPriority"""
ANSWERS = """
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaStreamIsCapturing(void *stream, int *state) { *state = 0; return 0; }
int cudaMemGetInfo(unsigned long *left, unsigned long *all) { *left = *all = 80UL << 30; return 0; }
"""


def stand_ins(folder: Path) -> Path:
    """A library of functions of the driver and the runtime that say yes and do nothing, named as the driver's is."""
    source, library = folder / "stand_ins.c", folder / "libcuda.so.1"
    empty = (f"int {name}(void) {{ return 0; }}\n" for name in f"{NOTHING} {RUNTIME}".split())
    source.write_text("".join(empty) + ANSWERS, encoding="utf-8")
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return library


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        device = {"max_shared_mem": SHARED[capability], "multiprocessor_count": 108, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=lambda _: {**device, "max_num_regs": 65536})

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_device_capability(self, _: int = 0) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def card(capability: int) -> None:
    """Let torch and Triton of this process believe in a card of this architecture, and launch nothing."""
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.fx_passes.post_grad as after
    import torch._inductor.runtime.triton_helpers as drivers
    import triton

    properties = SimpleNamespace(
        name="no card", major=capability // 10, minor=capability % 10, multi_processor_count=108, warp_size=32,
        total_memory=80 * 2**30, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, shared_memory_per_block=48 * 1024, gcnArchName="", L2_cache_size=40 * 2**20,
        shared_memory_per_block_optin=SHARED[capability], shared_memory_per_multiprocessor=SHARED[capability] + 1024,
    )  # fmt: skip
    cuda: Any = torch.cuda
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
                        "get_device_properties": properties, "_get_device_properties": properties,
                        "get_device_name": properties.name,
                        "get_device_capability": divmod(capability, 10), "is_initialized": False, "set_device": None,
                        "synchronize": None, "is_bf16_supported": True, "_exchange_device": 0,
                        "_maybe_exchange_device": 0, "set_rng_state": None}.items():  # fmt: skip
        setattr(cuda, name, lambda *_, _value=value, **__: _value)
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    for name in ("getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream", "init"):
        setattr(torch._C, f"_cuda_{name}", lambda *_: 0)
    torch._C._cuda_getDeviceCount = lambda: 1  # type: ignore[attr-defined]
    guards: Any = torch._C._dynamo.guards  # type: ignore[attr-defined]
    guards._empty_strided_cuda = lambda *shape: torch.empty_strided(*shape[:2], dtype=shape[2], device="cuda")
    guards.assert_size_stride = lambda *_, **__: None
    triton.runtime.driver.set_active(Driver(capability))
    drivers.set_driver_to_gpu = lambda: None
    joint.lazy_init = after.lazy_init = lambda *_, **__: None  # they trace patterns on the device
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]


def compiled() -> list[tuple[str, int]]:
    """A list that takes name and shared memory of every kernel that Triton compiles from now on; none is launched."""
    import torch._inductor.runtime.triton_heuristics as heuristics
    import triton

    found: list[tuple[str, int]] = []
    real = triton.compile

    def keeping(*args: Any, **kwargs: Any) -> Any:
        binary = real(*args, **kwargs)
        found.append((binary.metadata.name, binary.metadata.shared))
        return binary

    triton.compile = heuristics.triton.compile = keeping
    tuner: Any = heuristics.CachingAutotuner
    tuner._make_launchers = lambda self: setattr(self, "launchers", [lambda *_, **__: None])
    tuner.run = lambda self, *_, **__: None
    return found


def call(shape: tuple[int, int, int, int | None, float | None], use: str, dtype: torch.dtype) -> None:
    """FlexAttention as exalign calls it, on shapes alone: a row of three trees, or a step of 24 completions."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from exalign.data.batching import Group
    from exalign.models import attention
    from exalign.models.prefix_tree import BLOCK, mask_parts, policy_stream

    queries, keys, width, window, softcap = shape
    trees = [Group(i, torch.zeros(350).long(), tuple(torch.zeros(n).long() for n in (40, 30, 41))) for i in range(3)]
    layout = policy_stream(trees, torch.device("cpu"))[0].layout.with_window(window)
    parts, rows, pages = mask_parts(layout), 32, 40
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(use == "training"):

        def states(batch: int, heads: int, tokens: int) -> torch.Tensor:
            made = torch.empty(batch, heads, tokens, width, device="cuda", dtype=dtype)
            return made.requires_grad_(use == "training")

        if use == "decoding":
            numbers = [torch.empty(n, dtype=torch.int32, device="cuda") for n in (*[rows] * 3, *[pages] * 3)]
            numbers += [torch.empty(rows, 1, *tail, dtype=torch.int32, device="cuda") for tail in ((1,), (1, 5))]
            mask = attention._page_mask(numbers, pages * BLOCK, window)
            given = (states(rows, queries, 1), *(states(1, keys, pages * BLOCK) for _ in range(2)))
            attention.fused(*given, mask, scale=width**-0.5, softcap=softcap)
            return
        layout.masks[window] = [torch.empty(part.shape, dtype=part.dtype, device="cuda") for part in parts]
        given = tuple(states(1, heads, layout.num_tokens) for heads in (queries, keys, keys))
        attention.flex_tree_attention(*given, layout, scale=width**-0.5, softcap=softcap)


def check(capability: int, wanted: str) -> bool:
    """All that this process is asked for, a line each; whether all of it compiles and fits."""
    card(capability)
    kernels, whole = compiled(), True
    cells = [(name, dtype, use) for dtype in (torch.bfloat16, torch.float32) for use in USES for name in SHAPES]
    for name, dtype, use in cells:
        label = f"sm_{capability} | {str(dtype)[6:]} | {use} | {name}"
        if wanted not in label:
            continue
        torch._dynamo.reset()
        kernels.clear()
        begun = time.monotonic()
        try:
            call(SHAPES[name], use, dtype)
            said = ", ".join(f"{kernel.removeprefix('triton_')} {shared // 1024} KiB" for kernel, shared in kernels)
            fits = bool(kernels) and all(shared <= SHARED[capability] for _, shared in kernels)
            said += "" if fits else " — NOTHING WAS COMPILED" if not kernels else " — DOES NOT FIT"
        except Exception as error:  # whatever a lowering raises is what is looked for
            said, fits = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
        whole = whole and fits
        print(f"{label} | {'fits' if fits else 'FAILS'} | {said} | {time.monotonic() - begun:.0f} s", flush=True)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=SHARED, nargs="*", default=[*SHARED], help="e.g. 90")
    parser.add_argument("--only", default="", metavar="TEXT", help="lines that contain it")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        sys.exit(not check(given.here, given.only))
    with tempfile.TemporaryDirectory() as folder:
        library = stand_ins(Path(folder))
        settings = {"LD_PRELOAD": str(library), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        settings |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TRITON_CACHE_DIR": folder, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "benchmarks.compile_cuda", "--only", given.only, "--here"]
        runs = [subprocess.run([*command, str(arch)], env=os.environ | settings, check=False) for arch in given.arch]
    sys.exit(any(run.returncode for run in runs))


if __name__ == "__main__":
    main()
