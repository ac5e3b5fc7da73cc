"""Launches and host synchronisations of a pruned prefill, counted without a GPU.

The ways made for a GPU run on a CPU, on a model with the layers of LLaVA-NeXT-7B and narrow ones.
A *launch* is an ATen call that is no view and no allocation, or a kernel's start. A *host
synchronisation* is whatever keeps the host waiting for a GPU: a value or an array read back, a
shape that depends on values, a copy from or to memory that is not pinned.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from trio.benchmark.shapes.random_llava import LLAVA_NEXT_7B
from trio.benchmark.shapes.sizes import fill_weights
from trio.benchmark.speed.engine_speed import Workload, requests_for
from trio.decoder import attention, gpu
from trio.decoder.fused import fused_kernels
from trio.demo.language import tokenizer
from trio.engine.engine import Engine
from trio.pruning.options import Pruning
from trio.pruning.selection import nms_kernel
from trio.pruning.selection.nms_host import SimilarityMatrix, greedy
from trio.tables import aligned

NARROW = replace(
    LLAVA_NEXT_7B,
    hidden=64,
    intermediate=160,
    heads=2,
    vocabulary=1000,
    vision_hidden=32,
    vision_heads=2,
)
"""As many layers, tokens and tiles as LLaVA-NeXT-7B: what a prefill launches depends on these."""

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_FREE = {*_ALLOCATIONS, _aten.detach.default, _aten._unsafe_view.default, _aten.lift_fresh.default}
_READ_BACK = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
}
_FROM_DEVICE = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)


@dataclass(slots=True)
class Counted:
    """What was counted, in all and by the line that asked for it."""

    launches: int = 0
    syncs: int = 0
    by_operation: Counter[str] = field(default_factory=Counter)
    by_place: Counter[str] = field(default_factory=Counter)
    sync_places: Counter[str] = field(default_factory=Counter)

    def launch(self, operation: str) -> None:
        self.launches += 1
        self.by_operation[operation] += 1
        self.by_place[_place()] += 1

    def sync(self) -> None:
        self.syncs += 1
        self.sync_places[_place()] += 1


class _Device:
    """Which storages would lie on the GPU: those of the model, what is copied or made there, and
    what comes of these."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def put(self, value: Any) -> None:
        for x in tree_flatten(value)[0]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage)

    def has(self, value: Any) -> bool:
        return any(isinstance(x, Tensor) and self._one(x) for x in tree_flatten(value)[0])

    def _one(self, x: Tensor) -> bool:
        found = self._storages.get(x.untyped_storage()._cdata)
        return found is not None and not found.expired()


class _Operations(TorchDispatchMode):
    """ATen calls on what lies on the device."""

    def __init__(self, device: _Device, counted: Counted) -> None:
        super().__init__()
        self._device, self.counted = device, counted
        self.within = False
        """A kernel's replacement is running: it counts as one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = self._device.has((args, kwargs))
        mixed = func in (_aten.mm.dtype, _aten.bmm.dtype)
        out = _mixed_product(*args) if mixed else func(*args, **kwargs)
        if there:
            if not self.within:
                self._note(func, args)
            self._device.put(out)
        return out

    def _note(self, func: Any, args: Any) -> None:
        if func in _READ_BACK or _by_mask(func, args):
            self.counted.sync()
        if func in _FREE or _is_view(func):
            return
        self.counted.launch(str(func.overloadpacket).removeprefix("aten."))


class _Calls(TorchFunctionMode):
    """Copies between host and device, which a CPU does not see as such."""

    def __init__(self, device: _Device, counted: Counted, operations: _Operations) -> None:
        self._device, self.counted, self._operations = device, counted, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._operations.within:
            return func(*args, **kwargs)
        if func in _FROM_DEVICE and self._device.has(args[0]):
            self.counted.sync()
            return func(args[0].detach().clone(), *args[1:], **kwargs)
        out = func(*args, **kwargs)
        if func is Tensor.to and _names_a_place((*args[1:], *kwargs.values())):
            return self._uploaded(args[0], out, waits=not kwargs.get("non_blocking", False))
        if isinstance(kwargs.get("device"), torch.device) and isinstance(out, Tensor):
            if func in (torch.tensor, torch.as_tensor):
                return self._uploaded(None, out, waits=True)
            if not self._device.has(out):
                self._device.put(out)
                if "empty" not in func.__name__:
                    self.counted.launch(func.__name__)
        return out

    def _uploaded(self, host: Tensor | None, out: Tensor, *, waits: bool) -> Tensor:
        if host is not None and self._device.has(host):
            return out
        copy = out.clone()  # what stays on the host is not on the device
        self._device.put(copy)
        if copy.numel():
            self.counted.launch("copy to the device")
            if host is not None and host.dtype != copy.dtype:
                self.counted.launch("cast of it")
            # `sent` copies from pinned memory, where there is such.
            if waits and not _place().endswith("gpu.py:sent"):
                self.counted.sync()
        return copy


def _names_a_place(arguments: Sequence[Any]) -> bool:
    return any(isinstance(one, torch.device | Tensor) for one in arguments)


def _mixed_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Products with sums of a wider dtype, which a CPU does not have."""
    return left.to(dtype) @ right.to(dtype)


def _by_mask(func: Any, args: Any) -> bool:
    """Whether what is taken, and so its size, depends on values."""
    if func is not _aten.index.Tensor:
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def _is_view(func: Any) -> bool:
    returned = func._schema.returns
    return bool(returned) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returned
    )


def _place() -> str:
    """The innermost line of this package that a call comes from."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        own = "/trio/" in frame.filename and not frame.filename.endswith("launches.py")
        if own and frame.name != "__torch_function__":
            return f"{frame.filename.rpartition('/trio/')[2]}:{frame.name}"
    return "elsewhere"


class Counting:
    """Counts while `running`.

    model: whose weights lie on the device.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.counted = Counted()
        device = _Device()
        device.put([*model.parameters(), *model.buffers()])
        self._operations = _Operations(device, self.counted)
        self._calls = _Calls(device, self.counted, self._operations)

    @contextmanager
    def pretended(self) -> Iterator[None]:
        """Takes the ways made for a GPU, with something that computes the same for each kernel."""
        kernels: dict[str, Callable[..., Any]] = {
            "norm": _norm,
            "rotate": _rotate,
            "activate": _activate,
        }
        with ExitStack() as stack:
            stack.enter_context(patch.object(gpu, "_pretended", True))
            stack.enter_context(patch.object(gpu.Fetched, "__init__", self._fetch()))
            stack.enter_context(patch.object(attention, "_varlen_kernel", self._varlen))
            chosen = self.kernel("suppression and fill-up", _choose)
            stack.enter_context(patch.object(nms_kernel, "launch", chosen))
            for name in kernels:
                by_grid = _ByGrid(self.kernel(f"fused {name}", kernels[name]))
                stack.enter_context(patch.object(fused_kernels, name, by_grid))
            yield

    @contextmanager
    def running(self) -> Iterator[Counted]:
        """Counts, inside `pretended`."""
        self.counted = Counted()
        self._operations.counted = self._calls.counted = self.counted
        with self._operations, self._calls:
            yield self.counted

    def kernel(self, name: str, stand_in: Callable[..., Any]) -> Callable[..., Any]:
        """What computes the same as a kernel of that name, counted as its one launch."""

        def launch(*args: Any, **kwargs: Any) -> Any:
            self.counted.launch(name)
            before, self._operations.within = self._operations.within, True
            try:
                return stand_in(*args, **kwargs)
            finally:
                self._operations.within = before

        return launch

    def _fetch(self) -> Callable[..., None]:
        """In place of the start of a copy to the host, which is waited for when it is read."""

        def fetch(fetched: gpu.Fetched, *tensors: Tensor) -> None:
            self.counted.sync()
            copy = self.kernel("copy to the host", lambda x: x.numpy())
            fetched._tensors = tuple(torch.from_numpy(copy(x.detach()).copy()) for x in tensors)
            fetched._arrived = None

        return fetch

    def _varlen(self, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
        return self.kernel("varlen attention", _attend_packed)


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float
) -> Tensor:
    """Causal attention of sequences back to back, `[T, H, E]`."""
    bounds = offsets.detach().clone().tolist()
    pieces = []
    for start, stop in pairwise(bounds):
        query, key, value = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


class _ByGrid:
    """Called as a Triton kernel is."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self._kernel


def _norm(
    x: Tensor,
    added: Tensor,
    weight: Tensor,
    total: Tensor,
    out: Tensor,
    width: int,
    epsilon: float,
    *,
    ADDS: bool,
    **sizes: int,
) -> None:
    if ADDS:
        x = total.copy_(x + added)
    wide = x.float()
    out.copy_((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x) * weight)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: int, **sizes: int) -> None:
    for x in (query, key):
        left, right = x.chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1)
        x.copy_(x * cos[:, None] + turned * sin[:, None])


def _activate(gate: Tensor, up: Tensor, out: Tensor, count: int, **sizes: int) -> None:
    out.copy_(F.silu(gate) * up)


def _choose(
    dots_NVV: Tensor,
    norm_NV: Tensor,
    places_NV2: Tensor,
    order_NV: Tensor,
    count_N: Tensor,
    keep_N: Tensor,
    threshold: float,
    salient_part: int,
) -> Tensor:
    """As `trio.pruning.selection.nms_kernel.launch`."""
    cosines = dots_NVV / (norm_NV[:, :, None] * norm_NV[:, None])
    similar = SimilarityMatrix(cosines, places_NV2)
    taken = greedy(similar, count_N.numpy(), keep_N.numpy(), threshold, salient_part)
    stays_NV = torch.zeros_like(order_NV, dtype=torch.uint8)
    return stays_NV.scatter_(1, order_NV, torch.from_numpy(taken).byte())


PRUNINGS = {
    "unpruned": Pruning(),
    "nothing filled up": Pruning(retention=1 / 9, similarity_threshold=1.0),
    "filled up": Pruning(retention=1 / 9, similarity_threshold=-0.9),
}
"""The last one takes all tokens for alike, so that the fill-up chooses nearly all of them."""


def compare(images: int, places: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each of `PRUNINGS`, with layers as transformers has them and fused.

    Args:
        images: of one prefill.
        places: lines of code that launch most, of each row.
        tell: is told of every row that is done.
    """
    rows = []
    for name, pruning in PRUNINGS.items():
        for fused in (False, True):
            found = prefill(pruning, images, fused=fused)
            rows.append(
                {
                    "prefill": name,
                    "layers": "fused" if fused else "as transformers has them",
                    "launches": found.launches,
                    "host_syncs": found.syncs,
                    "launch_places": dict(found.by_place.most_common(places)),
                    "sync_places": dict(found.sync_places.most_common(places)),
                    "operations": dict(found.by_operation.most_common(places)),
                }
            )
            tell(f"{name}, {rows[-1]['layers']}")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The counts as aligned text, then where most launches and waits come from."""
    head = ["prefill", "layers", "launches", "host syncs"]
    counts = [
        [row["prefill"], row["layers"], str(row["launches"]), str(row["host_syncs"])]
        for row in rows
    ]
    places = [
        f"{row['prefill']}, {row['layers']}: {what} {_listed(row[f'{key}_places'])}"
        for row in rows
        for what, key in (("launches", "launch"), ("host syncs", "sync"))
    ]
    return "\n".join([aligned([head, *counts]), *places])


def _listed(places: dict[str, int]) -> str:
    return ", ".join(f"{place} {count}" for place, count in places.items())


def prefill(pruning: Pruning, images: int, *, fused: bool) -> Counted:
    """Of a prefill of so many images: tower, decoder and choosing."""
    model = NARROW.model(tokenizer()).to(torch.bfloat16).eval()
    fill_weights(model)
    processor = NARROW.processor(tokenizer())
    workload = Workload(batch=images, prompt_tokens=40, output_tokens=(1, 1))
    requests = requests_for(model, processor, workload)
    counting = Counting(model)
    with counting.pretended():
        engine = Engine(model, processor, pruning=pruning, kv_bytes=1 << 30, max_running=images)
        runner = engine._runner
        if not fused:
            runner.decoder.unfuse()
        assert runner.decoder.fused == fused
        for request in requests:
            engine.submit(request)
        sequences = engine._scheduler.admit()
        with counting.running() as counted:
            runner.prefill(sequences, runner.encode(sequences))
    return counted
