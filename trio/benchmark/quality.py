"""How much of the unpruned model's answers each pruning setting keeps, on held-out scenes.

Every setting answers the same requests: for each scene its caption and two questions, the kinds in
turn. A setting's accuracy is the share of exact answers; captions are also scored by the share of
objects named rightly. Intervals are 95 % Wilson intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from trio.config import Pruning
from trio.demo.scenes import KINDS, make_scene
from trio.demo.shard import asked_of, rotation
from trio.engine.engine import Engine
from trio.engine.request import Request, Result, Sampling
from trio.errors import UserError
from trio.pipeline.scoring import exact_match, object_share
from trio.tables import aligned

QUESTIONS_PER_SCENE = 3
MAX_NEW_TOKENS = 32
PROXY_METHODS = ("gradient", "trio")
"""Methods that look at a proxy's loss, so that its settings matter."""
USUAL_PROXY = ("next", "output")
"""Layer and head of a proxy that a label does not name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One request with its right answer."""

    request: Request
    kind: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One row of the table: what to prune and how."""

    pruning: Pruning
    encoder: str = "none"

    @property
    def label(self) -> str:
        words = [self.pruning.method]
        if self.pruning.method in PROXY_METHODS:
            words.append(self.pruning.proxy_positions)
            parts = (self.pruning.proxy_layer, self.pruning.proxy_head)
            words += [part for part in parts if part not in USUAL_PROXY]
        if self.pruning.position_ids:
            words.append(self.pruning.position_ids)
        return " ".join(words)


def settings(
    methods: Sequence[str],
    retentions: Sequence[float],
    encoders: Sequence[str],
    proxies: Sequence[Mapping[str, Any]],
    position_ids: Sequence[str | None],
    seed: int,
) -> list[Setting]:
    """The unpruned model first, then every method at every retention; methods without a proxy
    appear once per position handling.

    proxies: settings of the proxy to try, by their names in `Pruning`.
    """
    unknown = [encoder for encoder in encoders if encoder != "none"]
    if unknown:
        raise UserError(f"--encoders {unknown[0]} is not available in this version; there is: none")
    rows = [Setting(pruning=Pruning(method="none", retention=1.0, seed=seed))]
    pruned = [method for method in methods if method != "none"]
    for retention, method, handling in product(retentions, pruned, position_ids):
        pruning = Pruning(method=method, retention=retention, position_ids=handling, seed=seed)
        for proxy in proxies if method in PROXY_METHODS else ({},):
            rows.append(Setting(pruning=replace(pruning, **proxy)))
    return rows


def ask(scenes: int, seed: int) -> list[Asked]:
    """The requests: `QUESTIONS_PER_SCENE` about each of `scenes` held-out scenes."""
    if scenes < 1:
        raise UserError(f"--scenes is {scenes}; it must be at least 1")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be at least 0")
    rng = np.random.default_rng(seed)
    asked: list[Asked] = []
    for number in range(scenes):
        scene = make_scene(rng, "heldout")
        for question in asked_of(rng, scene, rotation(number, QUESTIONS_PER_SCENE)):
            request = Request(id=len(asked), prompt=question.prompt, images=(scene.image,))
            asked.append(Asked(request=request, kind=question.kind, answer=question.answer))
    return asked


def measure(
    model: Any, processor: Any, asked: Sequence[Asked], rows: Sequence[Setting]
) -> Iterator[dict[str, Any]]:
    """One object per setting, the first being the one that the others are relative to."""
    baseline: list[bool] | None = None
    words: list[str] = []
    for row in rows:
        sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
        engine = Engine(model, processor, pruning=row.pruning, sampling=sampling)
        results = _answers(engine, [one.request for one in asked])
        right = [
            exact_match(result.response or "", [one.answer])
            for one, result in zip(asked, results, strict=True)
        ]
        if baseline is None:
            baseline, words = right, [result.response or "" for result in results]
        yield _summary(row, asked, results, right, baseline, words)


def _answers(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    """Results in the order of the requests; an error here is a bug, not a wrong answer."""
    results = {result.id: result for result in engine.generate(requests)}
    failed = next((result for result in results.values() if result.error), None)
    assert failed is None, failed
    return [results[number] for number in range(len(requests))]


def _summary(
    row: Setting,
    asked: Sequence[Asked],
    results: Sequence[Result],
    right: Sequence[bool],
    baseline: Sequence[bool],
    words: Sequence[str],
) -> dict[str, Any]:
    captions = [index for index, one in enumerate(asked) if one.kind == "caption"]
    accuracy = float(np.mean(right))
    measured = [result.retention for result in results if result.retention is not None]
    has_proxy = row.pruning.method in PROXY_METHODS
    return {
        "method": row.pruning.method,
        "encoder": row.encoder,
        "retention": row.pruning.retention,
        "retention_measured": float(np.mean(measured)),
        "proxy_positions": row.pruning.proxy_positions if has_proxy else None,
        "proxy_layer": row.pruning.proxy_layer if has_proxy else None,
        "proxy_head": row.pruning.proxy_head if has_proxy else None,
        "position_ids": row.pruning.position_ids,
        "accuracy": accuracy,
        "accuracy_interval": wilson(sum(right), len(right)),
        "relative": accuracy / float(np.mean(baseline)) if any(baseline) else None,
        "agreement": float(
            np.mean(
                [
                    word == (result.response or "")
                    for word, result in zip(words, results, strict=True)
                ]
            )
        ),
        "n": len(asked),
        "by_kind": {kind: _kind(kind, asked, right, baseline) for kind in KINDS},
        "caption_objects": float(
            np.mean([object_share(results[i].response or "", [asked[i].answer]) for i in captions])
        ),
        "label": row.label,
    }


def _kind(
    kind: str, asked: Sequence[Asked], right: Sequence[bool], baseline: Sequence[bool]
) -> dict[str, Any] | None:
    chosen = [index for index, one in enumerate(asked) if one.kind == kind]
    if not chosen:
        return None
    hits, before = sum(right[i] for i in chosen), sum(baseline[i] for i in chosen)
    return {
        "accuracy": hits / len(chosen),
        "interval": wilson(hits, len(chosen)),
        "relative": hits / before if before else None,
        "n": len(chosen),
    }


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), without a correction for continuity."""
    share = hits / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - spread) / scale, (centre + spread) / scale


def describe(model: Any, requests: int, scenes: int, seed: int) -> str:
    """The conditions of the measurement, in one line."""
    return (
        f"{requests} requests about {scenes} held-out scenes, seed {seed}; greedy, "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}; ± is half a 95 % interval"
    )


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """The summaries as aligned text, one line per setting."""
    head = ["method", "retention", "measured", "exact", "±", "relative", "agree"]
    head += [*KINDS, "objects"]
    lines = [head]
    for one in summaries:
        low, high = one["accuracy_interval"]
        lines.append(
            [
                one["label"],
                f"{one['retention']:.3f}",
                f"{one['retention_measured']:.3f}",
                f"{one['accuracy']:.3f}",
                f"{(high - low) / 2:.3f}",
                "" if one["relative"] is None else f"{one['relative']:.3f}",
                f"{one['agreement']:.3f}",
                *(
                    f"{one['by_kind'][k]['accuracy']:.3f}" if one["by_kind"][k] else ""
                    for k in KINDS
                ),
                f"{one['caption_objects']:.3f}",
            ]
        )
    return aligned(lines)
