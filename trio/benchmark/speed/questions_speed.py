"""Several questions on each image: what it spares that the layers before the first stage see the
image once, whether answers stay as they are, and what the engine counts of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from trio.benchmark.shapes.sizes import build
from trio.benchmark.speed.engine_speed import Workload, requests_for, serve
from trio.engine.engine import Engine
from trio.engine.request import Prepared
from trio.families.registry import adapt
from trio.pruning.options import Pruning
from trio.tables import aligned

SHARED, ALONE = "shared", "alone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """each: questions on every image. tokens: of the shortest one; the next ones have one more."""

    each: int
    tokens: int


def compare(
    shape: str,
    workload: Workload,
    questions: Questions,
    prunings: Sequence[Pruning],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A figure for each of some prunings.

    Args:
        shape: name in `trio.benchmark.shapes.sizes`.
        workload: of one question on each image; `batch` counts images.
        rounds: with both ways each, one after the other; a warm-up comes before.
        tell: is told of every round that is done.

    Raises:
        UserError: no such shape, or a schedule that it cannot have.
    """
    model, processor = build(shape, device, dtype)
    first = requests_for(model, processor, workload)
    asked = list(_asked(first, questions, model, workload.seed))
    found = []
    for pruning in prunings:
        settled = adapt(model).settle(pruning)
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(
                    Engine(
                        model,
                        processor,
                        pruning=settled,
                        kv_bytes=_KV_BYTES,
                        share_images=name == SHARED,
                    )
                )
                for name in (SHARED, ALONE)
            }
            figure = _measure(engines, asked, device, rounds)
        stages = settled.stages(sum(first[0].image_tokens), adapt(model).decoder.num_layers)
        figure["first_stage"] = stages[0][0] if stages else None
        found.append(figure)
        tell(f"first stage at {figure['first_stage']}")
    return found


_KV_BYTES = 2 << 30


def _asked(
    images: Sequence[Prepared], questions: Questions, model: Any, seed: int
) -> Iterator[Prepared]:
    """The questions on the first image, then those on the next one."""
    generator = torch.Generator().manual_seed(seed + 1)
    config = model.config
    # Placeholders of images and videos are no words.
    first = max(config.image_token_id, getattr(config, "video_token_id", None) or 0) + 1
    for image in images:
        ids = image.input_ids
        end = len(ids) - ids[::-1].index(config.image_token_id)
        for number in range(questions.each):
            words = torch.randint(
                first,
                config.text_config.vocab_size,
                (questions.tokens + number,),
                generator=generator,
            )
            tokens = (*ids[:end], *words.tolist())
            yield replace(image, id=(image.id, number), input_ids=tokens)


def _measure(
    engines: dict[str, Engine], asked: Sequence[Prepared], device: torch.device, rounds: int
) -> dict[str, Any]:
    took: list[dict[str, float]] = []
    alike = len(asked)
    for number in range(rounds + 1):
        runs = {name: serve(engine, asked, device) for name, engine in engines.items()}
        found, expected = (
            {one.id: (one.token_ids, one.kept_tokens) for one in runs[name][1]}
            for name in (SHARED, ALONE)
        )
        alike = min(alike, sum(found[key] == one for key, one in expected.items()))
        if number:
            took.append({name: total for name, (total, _, _) in runs.items()})
    counted = runs[SHARED][2]
    ratios = [each[ALONE] / each[SHARED] for each in took]
    return {
        "questions": len(asked),
        "answered_alike": alike,
        "images_encoded": counted["images_encoded"],
        "image_layers": counted["image_layers"],
        "shared_prompts": counted["shared_prompts"],
        "shared_s": statistics.median(each[SHARED] for each in took),
        "alone_s": statistics.median(each[ALONE] for each in took),
        "ratio": statistics.median(ratios),
        "range": (min(ratios), max(ratios)),
    }


def table(figures: Sequence[dict[str, Any]]) -> str:
    """A row for each figure, as aligned text."""
    head = ["first stage", "answered alike", "images encoded", "images x layers", "ratio (range)"]
    rows = [
        [
            "none" if one["first_stage"] is None else str(one["first_stage"]),
            f"{one['answered_alike']} of {one['questions']}",
            str(one["images_encoded"]),
            str(one["image_layers"]),
            f"{one['ratio']:.2f} ({one['range'][0]:.2f}-{one['range'][1]:.2f})",
        ]
        for one in figures
    ]
    return aligned([head, *rows])
