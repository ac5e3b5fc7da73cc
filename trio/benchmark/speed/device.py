"""Speed and parity on a device, in parts: the cheapest and most decisive first.

A part yields its figures one by one, so that whoever writes each at once loses nothing when the
time on a lent device ends in the middle.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from trio.benchmark.shapes.sizes import build, named
from trio.benchmark.speed import ceilings
from trio.benchmark.speed.engine_speed import Workload, generate_inputs, requests_for, serve
from trio.decoder.attention import Padded, Paged
from trio.engine.engine import Engine
from trio.engine.kv_budget import PAGE
from trio.engine.request import Prepared
from trio.errors import UserError, first_line
from trio.pruning.options import Pruning

Figure = dict[str, Any]
PRUNED = Pruning(retention=1 / 9)
FILLED = Pruning(retention=1 / 9, similarity_threshold=-0.9)
"""All tokens count as alike, so that the fill-up chooses nearly all of them: the way that images
take, and random weights never do."""
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """prefill: images of each comparison. decode: pruning and requests of each. answer: tokens that
    each of these has. rows: requests that run at once in other parts. kv_bytes: for keys and values
    in bytes; None: what the device has left."""

    prefill: tuple[int, ...]
    decode: tuple[tuple[str, Pruning, int], ...]
    answer: int
    rows: int
    kv_bytes: int | None


SIZES = {
    "cuda": Sizes(
        prefill=(5, 20),
        decode=(("pruned", PRUNED, 64), ("pruned", PRUNED, 256), ("unpruned", Pruning(), 64)),
        answer=64,
        rows=256,
        kv_bytes=None,
    ),
    "cpu": Sizes(
        prefill=(5,),
        decode=(("pruned", PRUNED, 4), ("unpruned", Pruning(), 4)),
        answer=4,
        rows=8,
        kv_bytes=1 << 30,
    ),
}


class Bench:
    """A device, and a model of random weights on it, which is built when a part first needs it.

    Args:
        shape: of the model, one of `trio.benchmark.shapes.sizes.SHAPES`.
        seconds: that all parts may take together; one that would not fit is left out.

    Raises:
        UserError: no such shape.
    """

    def __init__(
        self, shape: str, device: torch.device, dtype: torch.dtype, seconds: float
    ) -> None:
        named(shape)
        self.shape, self.device, self.dtype = shape, device, dtype
        self.sizes = SIZES[device.type]
        self._began, self._seconds = time.perf_counter(), seconds

    @property
    def passed_s(self) -> float:
        return time.perf_counter() - self._began

    @property
    def left_s(self) -> float:
        return self._seconds - self.passed_s

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """With its processor."""
        return build(self.shape, self.device, self.dtype)

    @cached_property
    def _pool(self) -> list[Prepared]:
        return requests_for(*self.model, Workload(batch=4, prompt_tokens=40, output_tokens=(1, 1)))

    def requests(self, count: int, answer: int) -> list[Prepared]:
        """So many, of four images in turn, each with an answer of so many tokens."""
        requests = []
        for number in range(count):
            one = self._pool[number % len(self._pool)]
            assert one.sampling is not None
            sampling = replace(one.sampling, max_new_tokens=answer)
            requests.append(replace(one, id=number, sampling=sampling))
        return requests

    def engine(self, pruning: Pruning, **options: Any) -> Engine:
        model, processor = self.model
        self.free()
        options = {"kv_bytes": self.sizes.kv_bytes, **options}
        return Engine(model, processor, pruning=pruning, **options)

    def free(self) -> None:
        """What engines that are gone held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def milliseconds(self, work: Callable[[], object], tries: int = 5) -> float:
        """Of a call, on average, after two that are not counted."""

        def again(count: int) -> None:
            for _ in range(count):
                work()

        again(2)
        return ceilings.seconds(lambda: again(tries), self.device) / tries * 1e3


Part = Callable[[Bench], Iterator[Figure]]


def env(bench: Bench) -> Iterator[Figure]:
    """Versions, the device's limits and, of a GPU, which attention torch takes and its cost."""
    found: Figure = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if bench.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(bench.device)
        name = torch.cuda.get_device_name(bench.device)
        found |= {"cudnn": torch.backends.cudnn.version(), "gpu": name, "free_GB": free / 1e9}
    yield found
    limits = ceilings.measure(bench.device, bench.dtype)
    small = torch.zeros(1, device=bench.device)
    yield {
        "TFLOPs": limits.flops / 1e12,
        "copy_TBps": limits.bytes / 1e12,
        "us_per_eager_op": bench.milliseconds(lambda: small.add_(1), 2000) * 1e3,
    }
    if bench.device.type == "cuda":
        yield from _sdpa(bench)
        yield from _decode_attention(bench, limits)


def _sdpa(bench: Bench) -> Iterator[Figure]:
    """The kernel that torch chooses for a decode step and for a CLIP tower, and what its first call
    costs on two widths that this process has not seen."""
    cases = {"decode": ((64, 32, 1, 128), 512, True), "clip": ((25, 16, 577, 64), 577, False)}
    for case, ((batch, heads, queries, head), width, masked) in cases.items():
        first_ms = []
        for keys in (width, width + 64):
            query = _noise(bench, batch, heads, queries, head)
            both = _noise(bench, batch, heads, keys, head)
            mask = _mask(bench, batch, keys, 300) if masked else None
            chosen = torch._fused_sdp_choice(query, both, both, mask, 0.0, False)

            def attend(q: Tensor = query, kv: Tensor = both, mask: Tensor | None = mask) -> Tensor:
                return F.scaled_dot_product_attention(q, kv, kv, attn_mask=mask)

            first_ms.append(ceilings.seconds(attend, bench.device) * 1e3)
        yield {"sdpa": case, "kernel": SDPBackend(chosen).name, "first_call_ms": first_ms}


def _decode_attention(bench: Bench, limits: ceilings.Ceilings) -> Iterator[Figure]:
    """A decode step's attention of 256 requests over 231 of 320 stored tokens, by each kernel, and
    the least that reading the tokens takes."""
    batch, heads, head, width, used = 256, 32, 128, 320, 231
    query = _noise(bench, batch, heads, 1, head)
    keys, values = (_noise(bench, batch, heads, width, head) for _ in range(2))
    mask = _mask(bench, batch, width, used)
    read = 2 * batch * used * heads * head * bench.dtype.itemsize
    yield {"decode_attention": "limit by memory", "ms": read / limits.bytes * 1e3}

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    for kernel in (
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ):
        try:
            with sdpa_kernel(kernel):
                yield {"decode_attention": kernel.name, "ms": bench.milliseconds(attend)}
        except RuntimeError as error:
            yield {"decode_attention": kernel.name, "failed": first_line(error)}
    rows = [one.transpose(1, 2).reshape(batch * width, heads, head) for one in (keys, values)]
    starts = [
        torch.arange(0, (batch + 1) * step, step, dtype=torch.int32, device=bench.device)
        for step in (1, width)
    ]
    lengths = torch.full((batch,), used, dtype=torch.int32, device=bench.device)

    def flash() -> Tensor:
        out = torch.ops.aten._flash_attention_forward(
            query[:, :, 0],
            *rows,
            *starts,
            max_q=1,
            max_k=width,
            dropout_p=0.0,
            is_causal=False,
            return_debug_mask=False,
            scale=head**-0.5,
            seqused_k=lengths,
        )
        return out[0]

    difference = (flash().float() - attend()[:, :, 0].float()).abs().max().item()
    yield {
        "decode_attention": "FLASH_ATTENTION of so many keys each",
        "ms": bench.milliseconds(flash),
        "largest_difference": difference,
    }


def _noise(bench: Bench, *size: int) -> Tensor:
    return torch.randn(*size, device=bench.device, dtype=bench.dtype)


def _mask(bench: Bench, batch: int, width: int, used: int) -> Tensor:
    return (torch.arange(width, device=bench.device) < used).expand(batch, 1, 1, width)


def parity(bench: Bench) -> Iterator[Figure]:
    """Of six requests of a tiny model, how many are answered alike: unpruned as by `generate`, with
    CUDA graphs as without, in a batch as alone, on a GPU as on a CPU."""
    for dtype in DTYPES:
        model, processor = build("tiny", bench.device, dtype)
        workload = Workload(batch=6, prompt_tokens=40, output_tokens=(9, 16))
        requests = requests_for(model, processor, workload)
        answers = partial(_answers, model, processor, requests)
        expected = {request.id: _generated(model, request) for request in requests}
        unpruned, batch = answers(Pruning()), answers(PRUNED)
        eager, single = answers(PRUNED, graphs=False), answers(PRUNED, running=1)
        figure: Figure = {
            "dtype": str(dtype).removeprefix("torch."),
            "requests": len(requests),
            "as_generate": sum(unpruned[key][0] == expected[key] for key in expected),
            "first_token_as_generate": sum(
                unpruned[key][0][0] == expected[key][0] for key in expected
            ),
            "graphs_as_eager": sum(batch[key] == eager[key] for key in expected),
            "batch_as_single": sum(batch[key] == single[key] for key in expected),
        }
        if bench.device.type == "cuda" and dtype == torch.float32:
            there = _answers(model.cpu(), processor, requests, PRUNED)
            figure["kept_as_on_cpu"] = sum(there[key][1] == batch[key][1] for key in expected)
        yield figure


def _answers(
    model: Any,
    processor: Any,
    requests: Sequence[Prepared],
    pruning: Pruning,
    *,
    graphs: bool = True,
    running: int = 4,
) -> dict[Any, tuple[list[int], Any]]:
    """Tokens of each request's answer, and which visual tokens were kept for it."""
    with Engine(model, processor, pruning=pruning, kv_bytes=1 << 28, max_running=running) as engine:
        if not graphs:
            engine._runner.graphs = None
        results = {one.id: one for one in engine.generate(requests)}
        state = engine.stats()["cuda_graphs"]
    if graphs and state not in (None, "on"):
        raise UserError(f"CUDA graphs are {state}")
    return {key: (one.token_ids, one.kept_tokens) for key, one in results.items()}


def _generated(model: Any, request: Prepared) -> list[int]:
    """What `generate` answers to one request, so many tokens as it asks for."""
    assert request.sampling is not None
    tokens = request.sampling.max_new_tokens
    inputs = generate_inputs(model, [request])
    out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def prefill(bench: Bench) -> Iterator[Figure]:
    """Encoding, prefill and first token of some images at once, unpruned and pruned."""
    for images in bench.sizes.prefill:
        unpruned = _serve(bench, Pruning(), images, 1)
        yield {"pruning": "unpruned", **unpruned}
        pruned = _serve(bench, PRUNED, images, 1)
        yield {
            "pruning": "pruned",
            **pruned,
            "speed_up": unpruned["total_s"] / pruned["total_s"],
        }


def paged(bench: Bench) -> Iterator[Figure]:
    """A decode step's attention over pages, against the same keys in rectangles: how far apart they
    are, and what each costs."""
    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads in ((32, 32), (28, 4)):
        rows, head, most = bench.sizes.rows, 128, 400
        count = -(-most // PAGE)
        lengths = torch.randint(50, most, (rows,), generator=generator).to(bench.device)
        table = torch.randperm(rows * count, generator=generator).view(rows, count)
        layout = Paged(table.int().to(bench.device), lengths)
        query = _noise(bench, 1, heads, rows, head)
        keys, values = (_noise(bench, rows * count, PAGE, kv_heads, head) for _ in range(2))
        rectangle = Padded(lengths)
        stored = layout.gathered(keys).contiguous(), layout.gathered(values).contiguous()
        own = layout.attend(query, keys, values, head**-0.5)
        other = rectangle.attend(query, *stored, head**-0.5)
        read = 2 * int(lengths.sum()) * kv_heads * head * bench.dtype.itemsize
        yield {
            "heads": f"{heads} over {kv_heads}",
            "rows": rows,
            "largest_difference": (own.float() - other.float()).abs().max().item(),
            "pages_ms": bench.milliseconds(partial(layout.attend, query, keys, values, head**-0.5)),
            "rectangles_ms": bench.milliseconds(
                partial(rectangle.attend, query, *stored, head**-0.5)
            ),
            "read_MB": read / 1e6,
        }


def fused(bench: Bench) -> Iterator[Figure]:
    """The pruned prefill with layers as transformers has them, and fused."""
    for name, change in (("as transformers has them", _unfuse), ("fused", None)):
        yield {"layers": name, **_serve(bench, PRUNED, bench.sizes.prefill[0], 1, change=change)}


def graphs(bench: Bench) -> Iterator[Figure]:
    """Decode steps replayed from CUDA graphs, and launched one operation after the other."""
    for name, change in (("without graphs", _without_graphs), ("with graphs", None)):
        found = _serve(bench, PRUNED, bench.sizes.rows, bench.sizes.answer, change=change)
        yield {"steps": name, **found}


def admission(bench: Bench) -> Iterator[Figure]:
    """Requests whose prompts and answers differ in length, four times as many as run at once: how
    many run on average, and how much of the memory for keys and values holds tokens at most."""
    running = bench.sizes.rows
    given = bench.requests(4 * running, bench.sizes.answer)
    requests = [_of_another_length(one, number) for number, one in enumerate(given)]
    with bench.engine(PRUNED, max_running=running) as engine:
        total, _, counted = serve(engine, requests, bench.device)
        yield {
            "requests": len(requests),
            "max_running": running,
            "total_s": total,
            "output_tokens_per_s": counted["output_tokens"] / total,
            "running_mean": counted["running_mean"],
            "kv_used_of_budget": counted["kv_used_bytes_peak"] / counted["kv_budget_bytes"],
            "out_of_memory": counted["out_of_memory"],
        }


def _of_another_length(request: Prepared, number: int) -> Prepared:
    """Every third one without its image, and an answer of 1/4 to 4/4 of its length."""
    assert request.sampling is not None
    tokens = max(1, request.sampling.max_new_tokens * (1 + number % 4) // 4)
    sampling = replace(request.sampling, max_new_tokens=tokens)
    if number % 3:
        return replace(request, sampling=sampling)
    words = [token for token, run in groupby(request.input_ids) if len(list(run)) == 1]
    return replace(
        request, input_ids=tuple(words), image_inputs=(), image_tokens=(), sampling=sampling
    )


def _unfuse(engine: Engine) -> None:
    engine._runner.decoder.unfuse()


def _without_graphs(engine: Engine) -> None:
    engine._runner.graphs = None


def fill(bench: Bench) -> Iterator[Figure]:
    """The pruned prefill where the fill-up chooses."""
    yield {"pruning": "filled up", **_serve(bench, FILLED, bench.sizes.prefill[0], 1)}


def decode(bench: Bench) -> Iterator[Figure]:
    """Requests that run all at once, to the end of their answers."""
    for name, pruning, running in bench.sizes.decode:
        found = _serve(bench, pruning, running, bench.sizes.answer, batch_tokens=65536)
        yield {"pruning": name, **found}


def _serve(
    bench: Bench,
    pruning: Pruning,
    images: int,
    answer: int,
    *,
    batch_tokens: int | None = None,
    rounds: int = 2,
    change: Callable[[Engine], None] | None = None,
) -> Figure:
    """The last of some rounds, by the engine's own counters; one prefill of all images, unless the
    tokens of a batch are given. `change`: made to the engine first."""
    requests = bench.requests(images, answer)
    tokens = batch_tokens or sum(len(request.input_ids) + 1 for request in requests)
    with bench.engine(pruning, batch_tokens=tokens, max_running=images) as engine:
        if change is not None:
            change(engine)
        for _ in range(rounds):
            total, _, counted = serve(engine, requests, bench.device)
    each = {name: counted[f"{name}_s"] / images * 1e3 for name in ("encode", "prefill", "prune")}
    steps = counted["decode_steps"]
    return {
        "images": images,
        "output_tokens": answer,
        "total_s": total,
        "ms_per_image": total / images * 1e3,
        **{f"{name}_ms_per_image": value for name, value in each.items()},
        "decode_steps": steps,
        "ms_per_step": counted["decode_s"] / steps * 1e3 if steps else None,
        "running_mean": counted["running_mean"],
        "peak_GB": None
        if counted["device_bytes_peak"] is None
        else counted["device_bytes_peak"] / 1e9,
        "cuda_graphs": counted["cuda_graphs"],
        "out_of_memory": counted["out_of_memory"],
    }


def profile(bench: Bench) -> Iterator[Figure]:
    """Launches, copies, waits and the dearest kernels of a prefill and of a decode step."""
    activities = [ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    requests = bench.requests(bench.sizes.prefill[0], 8)
    engine = bench.engine(PRUNED, max_running=len(requests))
    list(engine.generate(requests))
    for request in requests:
        engine.submit(request)
    for step in ("prefill and first step", "decode step"):
        with profiled(activities=activities) as found:
            wall = ceilings.seconds(engine.step, bench.device)
        yield {"step": step, "ms": wall * 1e3, **_operations(found.key_averages())}
    engine.reset()


CALLS = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel"),
    "copies": ("cudaMemcpyAsync",),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
}


def _operations(events: Sequence[Any], count: int = 14) -> Figure:
    """Calls by kind; those that keep the device, or where there is none the CPU, longest."""
    on_device = any(event.self_device_time_total for event in events)

    def ms(event: Any) -> float:
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        return own / 1e3

    dearest = sorted(events, key=ms, reverse=True)[:count]
    return {
        **{
            name: sum(e.count for e in events if any(call in e.key for call in calls))
            for name, calls in CALLS.items()
        },
        "operations_ms": sum(map(ms, events)),
        "dearest": [[event.key[:60], event.count, ms(event)] for event in dearest],
    }


PARTS: Mapping[str, tuple[Part, float]] = {
    "env": (env, 5),
    "parity": (parity, 20),
    "paged": (paged, 5),
    "prefill": (prefill, 30),
    "fill": (fill, 15),
    "fused": (fused, 15),
    "profile": (profile, 15),
    "decode": (decode, 30),
    "graphs": (graphs, 30),
    "admission": (admission, 30),
}
"""In the order in which they run, each with the seconds that it is not begun without."""


def run(bench: Bench, parts: Sequence[str]) -> Iterator[Figure]:
    """Figures of these parts, in `PARTS`' order, each with its part and when it was known (`at_s`).

    A part that there is no time for, or that fails, gives a figure that says so (`skipped`,
    `failed`), and the next one runs.
    """
    for name, (part, needs_s) in PARTS.items():
        if name not in parts:
            continue
        try:
            if bench.left_s < needs_s:
                yield _figure(bench, name, skipped=f"{bench.left_s:.0f} of {needs_s:.0f} s left")
                continue
            for found in part(bench):
                yield _figure(bench, name, **found)
        except (RuntimeError, UserError) as error:
            trace = traceback.format_exc()[-2000:]
            yield _figure(bench, name, failed=first_line(error), trace=trace)
        bench.free()


def _figure(bench: Bench, part: str, **found: Any) -> Figure:
    return {"part": part, "at_s": round(bench.passed_s, 1), **found}
