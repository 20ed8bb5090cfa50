"""A pretend accelerator: tensors that hold real numbers on the CPU and say that they are on the device `pretend`.

Every operation on them goes through `_dispatch`, which raises `DeviceMixError` where a GPU would, because a CPU tensor
meets one of the device, and counts what costs time on a GPU: `launches`, operations that are no views; `waits`, copies
to the host, `.item()` and sizes that depend on data; `uploads`, copies from the host. `ASKED` says which lines asked
for the waits and uploads.

The numbers are real, so control flow may depend on them and results are those of the CPU. A process that has the device
keeps it, so what uses it runs in processes of its own: see `apart`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
MEMORY = 2**26
COUNTS: Counter[str] = Counter()
ASKED: Counter[str] = Counter()
Result = TypeVar("Result")

_VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "split",
    ),
    *("split_with_sizes", "detach", "alias", "as_strided", "unbind", "_reshape_alias", "unfold", "diagonal", "set_"),
    *(
        "lift_fresh",
        "is_same_size",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "resize_",
    ),
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # they take an index on the CPU, and copy it over
_MAY_MIX = {*_INDEXING, "copy_", "_to_copy", "set_", "_foreach_copy_"}
_SIZED_BY_DATA = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave"}
_ROUNDED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")  # what CUDA's autocast computes in half precision
_ACCURATE = ("layer_norm", "softmax.int", "log_softmax.int", "pow.Tensor_Scalar", "rsqrt", "logsumexp", "sum", "cumsum")
_libraries: list[torch.library.Library] = []  # what is registered lasts as long as they do


class DeviceMixError(RuntimeError):
    """A tensor on the CPU met one of the device."""


class PretendTensor(Tensor):
    """Holds `held`, a CPU tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = real
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({self.held})"

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: PretendTensor) -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.held = new.held

    def tolist(self) -> Any:
        _count("waits", "tolist")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def empty_cache(self) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=MEMORY)


def apart(workers: ForkServerContext, work: Callable[..., Result], *arguments: Any) -> Result:
    """`work(*arguments)` in a process that has the device; what fails there fails here, with its traceback."""
    ours, theirs = workers.Pipe(duplex=False)
    process = workers.Process(target=_apart, args=(theirs, list(sys.path), work, arguments))
    process.start()
    theirs.close()
    try:
        found, failure = ours.recv()
    except EOFError:
        found, failure = None, "its process ended"
    process.join()
    assert failure is None, failure
    return found


def _apart(answer: Any, path: list[str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    try:
        with device_present():
            found: Any = work(*arguments), None
    except BaseException:  # whatever it is, it is said where the test is
        found = None, traceback.format_exc()
    answer.send(found)


@contextmanager
def device_present() -> Iterator[None]:
    """The device is this process's accelerator from now on, and counts within the block."""
    import transformers

    from exalign.models import attention

    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    if not _libraries:
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())  # type: ignore[no-untyped-call]
        _register_autocast()
        torch.__future__.set_swap_module_params_on_conversion(True)  # as on CUDA, parameters stay the objects they are
    save = transformers.PreTrainedModel.save_pretrained

    def save_from_cpu(model: Any, *args: Any, **kwargs: Any) -> Any:  # a wrapper has no storage to be written
        state = {name: tensor.cpu() for name, tensor in (kwargs.pop("state_dict", None) or model.state_dict()).items()}
        with _disable_current_modes():
            return save(model, *args, state_dict=state, **kwargs)

    patches = [
        (transformers.PreTrainedModel, "save_pretrained", save_from_cpu),
        (torch, "inference_mode", torch.no_grad),  # a wrapper cannot be made in it
        (attention, "_compiled_flex", lambda: _flex_attention),  # torch knows no kernel for this device
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    lifted = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]  # torch.tensor(…, device=…) moves, visibly
    try:
        # In one thread: the mode is handed on to the threads of a backward pass, that flag is not.
        with _Mode(), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)  # type: ignore[attr-defined]
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """What the block costs, complete behind it."""
    before, found = Counter(COUNTS), Counter()
    ASKED.clear()
    yield found
    found.update(COUNTS - before)


def _count(what: str, name: str) -> None:
    COUNTS[what] += 1
    if what != "launches":
        frames = [f for f in traceback.extract_stack() if "/exalign/" in f.filename] or traceback.extract_stack()[-8:-7]
        ASKED[f"{what}: {frames[-1].filename.rsplit('/exalign/')[-1]}:{frames[-1].lineno} {name}"] += 1


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[-1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    others = [t for t in tensors if not isinstance(t, PretendTensor)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    plain = {**kwargs, **({"device": torch.device("cpu")} if asked == NAME else {})}
    plain.pop("pin_memory", None)
    if len(others) == len(tensors):
        out = func(*args, **plain)
        if asked != NAME:
            return out
        _count("uploads" if tensors else "launches", name)
        return tree_map(_wrapped, _unshared(out, others))
    _check_and_count(func, name, asked, args, kwargs, [t for t in others if t.dim() > 0])
    real_args, real_kwargs = tree_map(_real, (args, plain))
    out = func(*real_args, **real_kwargs)
    if asked == "cpu" and name == "_to_copy":
        return _unshared(out, [_real(t) for t in tensors])
    if name == "copy_" and not isinstance(args[0], PretendTensor):
        return args[0]
    # In-place and out= operations return what they were given.
    known = {id(t.held): t for t in tensors if isinstance(t, PretendTensor)}
    return tree_map(lambda x: known.get(id(x)) if id(x) in known else _wrapped(x), out)


def _check_and_count(func: Any, name: str, asked: str | None, args: Any, kwargs: Any, mixed: list[Tensor]) -> None:
    """What a GPU would refuse, and what the operation costs there."""
    if mixed and (name not in _MAY_MIX or (name in _INDEXING and not isinstance(args[0], PretendTensor))):
        raise DeviceMixError(f"{func}: a tensor {list(mixed[0].shape)} on the CPU meets one on {NAME}")
    if "flash_attention_for_cpu" in name:
        raise NotImplementedError(f"Could not run 'aten::{name}' with arguments from the 'CUDA' backend.")
    if mixed and name in _INDEXING:
        _count("uploads", name)
    by_mask = name.startswith("index") and any(
        t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]) if isinstance(t, Tensor)
    )
    sized = name in _SIZED_BY_DATA and kwargs.get("output_size") is None
    if name in ("_local_scalar_dense", "equal") or by_mask or sized or (name == "_to_copy" and asked == "cpu"):
        _count("waits", name)
    elif name == "copy_" and mixed:
        _count("uploads" if isinstance(args[0], PretendTensor) else "waits", name)
    if name not in _VIEWS and name not in ("_local_scalar_dense",) and not (name == "_to_copy" and asked == "cpu"):
        _count("launches", name)


def _unshared(out: Any, given: list[Tensor]) -> Any:
    return tree_map(lambda t: t.clone() if any(t is one for one in given) else t, out)


def _wrapped(x: Any) -> Any:
    return PretendTensor(x) if isinstance(x, Tensor) and not isinstance(x, PretendTensor) else x


def _real(x: Any) -> Any:
    return x.held if isinstance(x, PretendTensor) else x


def _register_autocast() -> None:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def rule(name: str, dtype_of: Callable[[], torch.dtype]) -> None:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def cast(x: Any) -> Any:
            floats = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype_of()) if floats else x

        def kernel(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*tree_map(cast, args), **tree_map(cast, kwargs))

        _libraries[1].impl(name, kernel, "AutocastPrivateUse1")

    _libraries.append(torch.library.Library("_", "IMPL"))
    _libraries[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _libraries.append(torch.library.Library("aten", "IMPL"))
    for name in _ROUNDED:
        rule(name, lambda: torch.get_autocast_dtype(NAME))
    for name in _ACCURATE:
        rule(name, lambda: torch.float32)


class _Flex(torch.autograd.Function):
    """One launch forward and one backward, as the fused kernel makes; inside, the dense definition."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, how: Callable[..., Tensor]) -> Any:
        ctx.save_for_backward(query, key, value)
        ctx.how = how
        _count("launches", "flex_attention")
        with _disable_current_modes():
            return PretendTensor(how(query.held, key.held, value.held))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        _count("launches", "flex_attention_backward")
        with _disable_current_modes(), torch.enable_grad():
            real = [states.held.detach().requires_grad_() for states in ctx.saved_tensors]
            grads = torch.autograd.grad(ctx.how(*real), real, grad.held)
        return *map(PretendTensor, grads), None


def _flex_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    score_mod: Any,
    block_mask: BlockMask,
    scale: float,
    enable_gqa: bool,
    kernel_options: dict[str, int] | None,
) -> Any:
    """What FlexAttention computes, from its block mask alone, with what it refuses; options are for speed alone."""
    if min(query.shape[-1], value.shape[-1]) < 16:
        raise NotImplementedError("NYI: embedding dimension of the query, key, and value must be at least 16")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"Expected query, key, and value to have the same dtype, but got {query.dtype}, {key.dtype}")
    if not (query.shape[1] == key.shape[1] or enable_gqa):
        raise ValueError("Expect query and key/value to have the same number of heads")
    lists = [block_mask.kv_num_blocks, block_mask.kv_indices]
    if block_mask.full_kv_num_blocks is not None:
        lists += [block_mask.full_kv_num_blocks, block_mask.full_kv_indices]
    if key.shape[0] not in (1, query.shape[0]) or len(lists[0]) != query.shape[0]:
        raise ValueError("Expect query and key/value, or block_mask and query, to have the same batch size")
    queries, keys = query.shape[2], key.shape[2]
    if tuple(block_mask.seq_lengths) != (queries, keys):
        raise ValueError("block_mask was created for another length")
    if not all(isinstance(part, PretendTensor) for part in lists):
        raise DeviceMixError("the block mask is on the CPU")
    zero, q, k = _wrapped(torch.zeros((), dtype=torch.long)), *(_wrapped(torch.arange(n)) for n in (queries, keys))
    batch = _wrapped(torch.arange(len(query)))[:, None, None]
    before = Counter(COUNTS)
    seen = block_mask.mask_mod(batch, zero, q[:, None], k[None]).held.expand(len(query), queries, keys)
    COUNTS.clear()
    COUNTS.update(before)  # the rule is part of the kernel
    with _disable_current_modes():
        part, *whole = (
            torch.stack([_dense(*(_real(x)[row, 0] for x in pair), queries, keys) for row in range(len(query))])
            for pair in (lists[:2], lists[2:])
            if pair
        )
        visible = (part & seen) | whole[0] if whole else part & seen
        visible = visible[:, None]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
        if score_mod is not None:
            scores = score_mod(scores, None, None, None, None)
        return scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num().to(value.dtype) @ value

    return _Flex.apply(query, key, value, attend)  # type: ignore[no-untyped-call]


def _dense(counts: Tensor, indices: Tensor, queries: int, keys: int) -> Tensor:
    """The pairs of the blocks in FlexAttention's lists, bool `[queries, keys]`."""
    blocks = torch.zeros(len(indices), -(-keys // 128), dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(counts.tolist(), indices, strict=True)):
        blocks[row, columns[:count]] = True
    return blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[:queries, :keys]
