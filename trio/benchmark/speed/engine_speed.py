"""How fast, side by side in one run: transformers' `generate`, our engine, both with and without
pruning.

All subjects answer the same random requests on the same random weights, one after the other in
every round, so that whatever slows the machine down meets all of them. Figures are medians over
rounds, ratios are medians of the ratios within a round. Where busy loops are asked for, every round
has each subject once without them and once beside them.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from trio.benchmark.shapes.sizes import build
from trio.benchmark.speed.ceilings import Ceilings, PeakMemory, seconds
from trio.benchmark.speed.ceilings import measure as measure_ceilings
from trio.benchmark.speed.neighbours import neighbours as busy
from trio.engine.engine import Engine
from trio.engine.metrics import choosing_flops
from trio.engine.preprocess import Preprocessor
from trio.engine.request import Prepared, Request, Result, Sampling
from trio.errors import UserError
from trio.families.pixel_tables import finished
from trio.families.registry import adapt
from trio.patching import patch, unpatch
from trio.pruning.flops import DecoderShape
from trio.pruning.options import Pruning
from trio.pruning.schedule import tokens_per_layer
from trio.tables import aligned, counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """batch: requests, one image each, all waiting at once. prompt_tokens: text tokens of each.
    output_tokens: shortest and longest answer; lengths are spread evenly between them."""

    batch: int
    prompt_tokens: int
    output_tokens: tuple[int, int]
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        """Output tokens of each request, in an order that is mixed but always the same."""
        low, high = self.output_tokens
        span = max(1, self.batch - 1)
        spread = torch.tensor([low + (high - low) * i // span for i in range(self.batch)])
        order = torch.randperm(self.batch, generator=torch.Generator().manual_seed(self.seed))
        return spread[order].tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one subject did in one round."""

    total_s: float
    prefill_s: float
    """Encoding, prefill and pruning."""
    prune_s: float | None
    decode_s: float
    output_tokens: int
    kv_bytes: int
    flops: float
    """Of the decoder's prefill, by the field's convention, one per multiply-add."""
    decode_bytes: float | None
    """Weights, keys and values that decoding read."""
    peak_bytes: int | None


class Subject(Protocol):
    name: str

    def run(self) -> Run: ...


class EngineSubject:
    """Our engine."""

    def __init__(
        self, name: str, model: Any, processor: Any, pruning: Pruning, requests: list[Prepared]
    ) -> None:
        self.name = name
        self._make = partial(Engine, model, processor, pruning=pruning, max_running=len(requests))
        self._engine: Engine | None = None
        self._requests = requests
        self._device = model.device
        self._weights = decoder_bytes(model)
        self._shape = DecoderShape.of_config(model.config.text_config)
        self._element = model.dtype.itemsize

    def run(self) -> Run:
        if self._device.type == "cuda":
            with self._make() as engine:  # one at a time: it takes the memory that is free
                serve(engine, self._requests, self._device)  # records the decode steps
                return self._measured(engine)
        self._engine = self._engine or self._make()
        return self._measured(self._engine)

    def _measured(self, engine: Engine) -> Run:
        peak = PeakMemory(self._device)
        total, results, stats = serve(engine, self._requests, self._device)
        read = self._weights * stats["decode_steps"] + sum(map(self._cache_reads, results))
        return Run(
            total_s=total,
            prefill_s=stats["encode_s"] + stats["prefill_s"],
            prune_s=stats["prune_s"],
            decode_s=stats["decode_s"],
            output_tokens=stats["output_tokens"],
            kv_bytes=sum(result.kv_bytes or 0 for result in results),
            flops=sum(result.prefill_flops or 0 for result in results),
            decode_bytes=read,
            peak_bytes=peak.read(),
        )

    def _cache_reads(self, result: Result) -> int:
        """Bytes of keys and values read for one answer: each step reads all, and adds one token."""
        steps = len(result.token_ids) - 1
        token = self._shape.kv_bytes([1] * self._shape.num_layers, self._element)
        return steps * (result.kv_bytes or 0) - token * steps * (steps - 1) // 2


class GenerateSubject:
    """`model.generate` on batches of one size, pruned by `trio.patch` where settings are given.

    A batch goes on until its longest answer is complete, as it does for everybody.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        requests: Sequence[Prepared],
        size: int,
        pruning: Pruning | None,
    ) -> None:
        self.name = name
        self.size = size
        self._model = model
        self._requests = requests
        self._pruning = pruning
        self._shape = DecoderShape.of_config(model.config.text_config)

    def run(self) -> Run:
        device = self._model.device
        if self._pruning is not None:
            patch(self._model, self._pruning)
        try:
            first = seconds(lambda: self._generate(one=True), device)
            peak = PeakMemory(device)
            total = seconds(lambda: self._generate(one=False), device)
        finally:
            if self._pruning is not None:
                unpatch(self._model)
        return Run(
            total_s=total,
            prefill_s=first,
            prune_s=None,
            decode_s=total - first,
            output_tokens=sum(map(_asked, self._requests)),
            kv_bytes=sum(map(self._kv_bytes, self._requests)),
            flops=sum(self._shape.prefill_flops(self._layers(r)) for r in self._requests),
            decode_bytes=None,
            peak_bytes=peak.read(),
        )

    def _generate(self, *, one: bool) -> None:
        for start in range(0, len(self._requests), self.size):
            batch = self._requests[start : start + self.size]
            tokens = 1 if one else max(map(_asked, batch))
            self._model.generate(
                **generate_inputs(self._model, batch),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
            )

    def _layers(self, request: Prepared) -> list[int]:
        """Prompt tokens in each layer."""
        visual, layers = sum(request.image_tokens), self._shape.num_layers
        stages = (self._pruning or Pruning()).stages(visual, layers)
        text = len(request.input_ids) - visual
        return [text + kept for kept in tokens_per_layer(visual, stages, layers)]

    def _kv_bytes(self, request: Prepared) -> int:
        added = max(map(_asked, self._requests)) - 1
        stored = [tokens + added for tokens in self._layers(request)]
        return self._shape.kv_bytes(stored, self._model.dtype.itemsize)


def serve(
    engine: Engine, requests: Sequence[Prepared], device: torch.device
) -> tuple[float, list[Result], dict[str, Any]]:
    """Wall time in seconds of all requests, their results, and the engine's counters of them.

    Raises:
        UserError: a request failed.
    """
    engine.stats(reset=True)
    results: list[Result] = []
    total = seconds(lambda: results.extend(engine.generate(requests)), device)
    stats = engine.stats()
    if stats["failed"]:
        error = next(result.error for result in results if result.error)
        raise UserError(f"a request of the measurement failed: {error}")
    return total, results, stats


def generate_inputs(model: Any, batch: Sequence[Prepared]) -> dict[str, Tensor]:
    """What `model.generate` takes for prompts of one length, each with images."""
    ids = torch.tensor([request.input_ids for request in batch], device=model.device)
    images = finished([i for request in batch for i in request.image_inputs], model.device)
    inputs = {
        name: torch.cat([image[name] for image in images]).to(model.device) for name in images[0]
    }
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        # Without them a model whose positions depend on images takes these for text.
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def _asked(request: Prepared) -> int:
    """Tokens of its answer."""
    assert request.sampling is not None
    return request.sampling.max_new_tokens


def requests_for(model: Any, processor: Any, workload: Workload) -> list[Prepared]:
    """Random words and random pixels of the image that gives most visual tokens.

    Already prepared: preparing is measured by `pipeline`.
    """
    generator = torch.Generator().manual_seed(workload.seed)
    adapter = adapt(model)
    config, (width, height) = model.config, adapter.largest_image
    image_token = config.image_token_id
    prepare = Preprocessor(processor, type(adapter))
    requests = []
    for number, length in enumerate(workload.lengths):
        words = torch.randint(
            image_token + 1,
            config.text_config.vocab_size,
            (workload.prompt_tokens,),
            generator=generator,
        ).tolist()
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        image = prepare(Request(prompt="", images=(Image.fromarray(pixels.numpy()),)))
        assert isinstance(image, Prepared), image
        (visual,) = image.image_tokens
        requests.append(
            replace(
                image,
                input_ids=(*words[:1], *[image_token] * visual, *words[1:]),
                id=number,
                sampling=Sampling(max_new_tokens=length, ignore_eos=True),
            )
        )
    return requests


def best_batch_size(model: Any, requests: Sequence[Prepared]) -> int:
    """The batch size at which plain `generate` answers fastest, of those that fit into memory: one,
    the whole, a quarter of it, a sixteenth.

    Raises:
        UserError: not even one fits.
    """
    times = {}
    for size in sorted({max(1, len(requests) // part) for part in (1, 4, 16, len(requests))}):
        subject = GenerateSubject("", model, requests[:size], size, None)
        try:
            times[size] = subject.run().total_s / size
        except torch.OutOfMemoryError:
            break
    if not times:
        raise UserError("not one request fits into the device's memory; take a smaller --shape")
    return min(times, key=times.__getitem__)


def measure(subjects: Sequence[Subject], rounds: int) -> Iterator[dict[str, Run]]:
    """One warm-up, then the rounds, each with a run of every subject."""
    for number in range(rounds + 1):
        runs = {subject.name: subject.run() for subject in subjects}
        if number:
            yield runs


def beside(subjects: Sequence[Subject], count: int) -> dict[str, Run]:
    """A run of every subject beside so many busy loops."""
    with busy(count):
        return {subject.name: subject.run() for subject in subjects}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Multiply-adds of the prefill of all requests, pruned: what comes on top of the decoder's."""

    encoder: float
    proxy: float


def work_of(model: Any, pruning: Pruning, requests: Sequence[Prepared]) -> Work:
    """FLOPs of the vision tower and of scoring and choosing."""
    adapter = adapt(model)
    shape = adapter.shape()
    encoder = proxy = 0
    for request in requests:
        (image,), (visual,) = request.image_inputs, request.image_tokens
        encoder += adapter.vision_flops(image)
        proxy += choosing_flops(shape, pruning, (visual,), len(request.input_ids) - visual)
    return Work(encoder=encoder, proxy=proxy)


def decoder_bytes(model: Any) -> int:
    """Weights that one decode step reads."""
    parts = [*model.model.language_model.layers, model.model.language_model.norm, model.lm_head]
    return sum(p.nbytes for part in parts for p in part.parameters())


def subjects_for(
    model: Any, processor: Any, requests: list[Prepared], pruning: Pruning
) -> list[Subject]:
    """The four rows of the table."""
    size = best_batch_size(model, requests)
    return [
        GenerateSubject(GENERATE, model, requests, size, None),
        EngineSubject(ENGINE, model, processor, Pruning(), requests),
        EngineSubject(PRUNED, model, processor, pruning, requests),
        GenerateSubject(PATCHED, model, requests, size, pruning),
    ]


GENERATE, ENGINE, PRUNED, PATCHED = "generate", "engine", "engine trio", "patch + generate"


def summary(
    rounds: Sequence[dict[str, Run]], work: Work, ceilings: Ceilings, images: int
) -> dict[str, Any]:
    """Medians, ratios and utilisation; the keys of the JSON file.

    Ratios to `generate`, which is what a user has without this package, come first; `ranges` holds
    the smallest and the largest of each over the rounds.
    """

    def ratio(of: Callable[[dict[str, Run]], float]) -> float:
        return statistics.median(of(runs) for runs in rounds)

    measured: dict[str, Callable[[dict[str, Run]], float]] = {
        "prefill_vs_generate": lambda r: r[GENERATE].prefill_s / r[PRUNED].prefill_s,
        "pruned_vs_generate": lambda r: r[GENERATE].total_s / r[PRUNED].total_s,
        "engine_vs_generate": lambda r: r[GENERATE].total_s / r[ENGINE].total_s,
        "prefill_speedup": lambda r: r[ENGINE].prefill_s / r[PRUNED].prefill_s,
        "throughput_speedup": lambda r: r[ENGINE].total_s / r[PRUNED].total_s,
        "prune_share": lambda r: (r[PRUNED].prune_s or 0.0) / r[PRUNED].prefill_s,
    }
    plain, pruned = rounds[0][ENGINE], rounds[0][PRUNED]
    total = pruned.flops + work.encoder + work.proxy
    return {
        **{name: ratio(of) for name, of in measured.items()},
        "ranges": {
            name: (min(map(of, rounds)), max(map(of, rounds))) for name, of in measured.items()
        },
        "flops_ratio": plain.flops / pruned.flops,
        "flops_ratio_total": (plain.flops + work.encoder) / total,
        "kv_ratio": plain.kv_bytes / pruned.kv_bytes,
        "ceilings": asdict(ceilings),
        "rows": [
            _row(name, [r[name] for r in rounds], work, ceilings, images) for name in rounds[0]
        ],
    }


def _row(
    name: str, runs: Sequence[Run], work: Work, ceilings: Ceilings, images: int
) -> dict[str, Any]:
    def middle(of: Callable[[Run], float]) -> float:
        return statistics.median(map(of, runs))

    one = runs[0]
    flops_total = one.flops + work.encoder + (work.proxy if name in (PRUNED, PATCHED) else 0.0)
    read = one.decode_bytes
    return {
        "name": name,
        "total_s": middle(lambda run: run.total_s),
        "total_s_range": (min(r.total_s for r in runs), max(r.total_s for r in runs)),
        "prefill_s": middle(lambda run: run.prefill_s),
        "prefill_s_range": (min(r.prefill_s for r in runs), max(r.prefill_s for r in runs)),
        "prune_share": None
        if one.prune_s is None
        else middle(lambda run: (run.prune_s or 0.0) / run.prefill_s),
        "decode_s": middle(lambda run: run.decode_s),
        "images_per_s": images / middle(lambda run: run.total_s),
        "tokens_per_s": middle(lambda run: run.output_tokens / run.total_s),
        "peak_bytes": None if one.peak_bytes is None else max(run.peak_bytes or 0 for run in runs),
        "kv_bytes": one.kv_bytes,
        "flops": one.flops,
        "flops_total": flops_total,
        "prefill_utilisation": middle(lambda r: 2 * flops_total / r.prefill_s) / ceilings.flops,
        "decode_utilisation": None
        if read is None
        else middle(lambda r: (r.decode_bytes or 0.0) / r.decode_s) / ceilings.bytes,
    }


def table(summary: dict[str, Any]) -> str:
    """The rows as aligned text, then the ratios; the same again beside busy loops, if there were
    any, and what share of its images per second each subject has left there."""
    text = _table(summary)
    disturbed = summary.get("neighbours")
    if disturbed is None:
        return text
    left = "\n".join(
        f"{name}: {share:.2f} of its images/s" for name, share in disturbed["images_left"].items()
    )
    return (
        f"{text}\n\nbeside {counted(disturbed['count'], 'busy loop')}\n{_table(disturbed)}\n{left}"
    )


def _table(summary: dict[str, Any]) -> str:
    head = ["", "prefill s", "prune", "decode s", "total s", "(range)", "images/s", "tokens/s"]
    head += ["peak MB", "KV MB", "GFLOPs", "with all", "FLOPs of limit", "bytes of limit"]
    lines = [head]
    for row in summary["rows"]:
        low, high = row["total_s_range"]
        lines.append(
            [
                row["name"],
                f"{row['prefill_s']:.3f}",
                _percent(row["prune_share"]),
                f"{row['decode_s']:.3f}",
                f"{row['total_s']:.3f}",
                f"{low:.3f}-{high:.3f}",
                f"{row['images_per_s']:.2f}",
                f"{row['tokens_per_s']:.1f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
                f"{row['kv_bytes'] / 1e6:.1f}",
                f"{row['flops'] / 1e9:.1f}",
                f"{row['flops_total'] / 1e9:.1f}",
                _percent(row["prefill_utilisation"]),
                _percent(row["decode_utilisation"]),
            ]
        )
    text = [aligned(lines)]
    for key, value in summary.items():
        if isinstance(value, float):
            low_high = summary["ranges"].get(key)
            spread = f" ({low_high[0]:.3f}-{low_high[1]:.3f})" if low_high else ""
            text.append(f"{key} {value:.3f}{spread}")
    return "\n".join(text)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def compare(
    shape: str,
    workload: Workload,
    pruning: Pruning,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    tell: Callable[[str], None],
    neighbours: int = 0,
) -> dict[str, Any]:
    """Build a model and measure all four subjects on it.

    Args:
        shape: name in `trio.benchmark.shapes.sizes`.
        rounds: with a run of every subject each.
        tell: is told of every round that is done.
        neighbours: busy loops beside a second run of every subject in each round; 0: no such run.

    Returns:
        Ratios, ceilings and rows, as in the JSON file; with busy loops the same again, below
        `neighbours`, with their `count` and `images_left`, each subject's share of its own images
        per second.

    Raises:
        UserError: no such shape, or it does not fit into memory.
    """
    model, processor = build(shape, device, dtype)
    pruning = adapt(model).settle(pruning)
    requests = requests_for(model, processor, workload)
    subjects = subjects_for(model, processor, requests, pruning)
    ceilings = measure_ceilings(device, dtype)
    alone, disturbed = [], []
    for runs in measure(subjects, rounds):
        alone.append(runs)
        if neighbours:
            disturbed.append(beside(subjects, neighbours))
        tell(f"round {len(alone)}/{rounds}")
    work = work_of(model, pruning, requests)
    found = summary(alone, work, ceilings, workload.batch)
    if neighbours:
        again = summary(disturbed, work, ceilings, workload.batch)
        left = images_left(alone, disturbed)
        found["neighbours"] = {"count": neighbours, "images_left": left, **again}
    return found


def images_left(
    alone: Sequence[dict[str, Run]], disturbed: Sequence[dict[str, Run]]
) -> dict[str, float]:
    """Images per second beside busy loops over those without, of each subject."""
    pairs = list(zip(alone, disturbed, strict=True))
    return {
        name: statistics.median(one[name].total_s / other[name].total_s for one, other in pairs)
        for name in alone[0]
    }
