"""Draw which visual tokens each stage keeps: `python -m trio.demo.kept_picture OUT.png`.

One row of panels per request of the bundled shard: the image, then the image after each pruning
stage, where a kept token's patch is as it was and a dropped one's is faded. Below it stand the
prompt, the model's own answer and, where that is wrong, the right one.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

import trio
from trio.bundled import SHARD
from trio.errors import UserError
from trio.viz import fade, image_tokens

SCHEDULE = "0:118,5:69,8:28"
"""What a retention of 1/9 is on the bundled model."""
ROWS = ("scene-0027-caption", "scene-0027-presence")
"""Two prompts about one image: other tokens stay."""
ZOOM = 2
"""Pixels of the picture per pixel of an image; a page shows it at half its width."""
GAP, MARGIN, LINE = 36, 32, 44
"""Between panels, around them, and from line to line of text, in pixels of the picture."""
TEXT, SMALL = 30, 25
"""Sizes of the text in pixels of the picture."""
CARD, INK, FAINT = (246, 248, 250), (31, 35, 40), (89, 99, 110)
RIGHT, WRONG = (26, 127, 55), (207, 34, 46)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One request of the picture."""

    request: trio.Request
    answers: list[str]
    """The right ones."""
    result: trio.Result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="PNG file to write")
    parser.add_argument("--rows", nargs="+", default=ROWS, help="ids of rows of the bundled shard")
    parser.add_argument("--schedule", default=SCHEDULE, help="layer:kept of each stage")
    options = parser.parse_args(arguments)
    try:
        shown = answer(options.rows, options.schedule)
    except UserError as error:
        parser.error(str(error))
    draw(shown, options.schedule).save(options.output, optimize=True)


def answer(ids: Sequence[str], schedule: str) -> list[Shown]:
    """Ask the bundled model about these rows of the bundled shard, pruned with TRIO.

    Raises:
        UserError: a row is not there, the schedule is wrong, or a request failed.
    """
    rows = {row["id"]: row for row in pq.read_table(SHARD).to_pylist()}
    if unknown := [name for name in ids if name not in rows]:
        raise UserError(f"--rows {unknown[0]}: the bundled shard has {', '.join(rows)}")
    requests = [_request(rows[name]) for name in ids]
    engine = trio.Engine.from_pretrained("demo", pruning=trio.Pruning(schedule=schedule))
    results = {result.id: result for result in engine.generate(requests)}
    if errors := [result.error for result in results.values() if result.error]:
        raise UserError(errors[0])
    return [
        Shown(request=request, answers=rows[request.id]["answers"], result=results[request.id])
        for request in requests
    ]


def _request(row: Mapping[str, Any]) -> trio.Request:
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    prompt = row["prompt"].replace(" ?", "?").replace(" .", ".")  # the same tokens
    prompt = prompt[0].upper() + prompt[1:]
    return trio.Request(id=row["id"], prompt=prompt, images=(image,), explain=True)


def draw(shown: Sequence[Shown], schedule: str) -> Image.Image:
    """The picture: a card with a row of panels per request, and a line on what it shows."""
    rows = [_row(one, [f"from layer {layer}" for layer in _layers(schedule)]) for one in shown]
    width = rows[0].width + 2 * MARGIN
    height = sum(row.height for row in rows) + LINE + 2 * MARGIN
    card = Image.new("RGB", (width, height), CARD)
    for place, row in enumerate(rows):
        card.paste(row, (MARGIN, MARGIN + place * row.height))
    retention = shown[0].result.retention
    assert retention is not None
    legend = (
        f"Faded: dropped. Kept, averaged over the layers: {retention:.1%} of the visual tokens."
    )
    _write(card, (MARGIN, height - MARGIN - LINE), legend, SMALL, FAINT)
    return card.quantize(256, kmeans=1, dither=Image.Dither.NONE)


def _layers(schedule: str) -> tuple[int, ...]:
    return trio.Schedule.parse(schedule).layers


def _row(shown: Shown, stages: Sequence[str]) -> Image.Image:
    """Panels side by side with their counts, and prompt and answer underneath."""
    result, (image,) = shown.result, shown.request.images
    assert isinstance(image, Image.Image)
    assert result.response is not None
    tokens = image_tokens(result)
    panels = [image, *(fade(image, tokens.boxes, stage.kept) for stage in tokens.stages)]
    counts = [f"{len(tokens.boxes)} visual tokens"]
    counts += [
        f"{name}: {stage.kept.sum()}" for name, stage in zip(stages, tokens.stages, strict=True)
    ]
    step, height = image.width * ZOOM + GAP, image.height * ZOOM
    row = Image.new("RGB", (step * len(panels) - GAP, height + 2 * LINE + MARGIN), CARD)
    for place, (panel, count) in enumerate(zip(panels, counts, strict=True)):
        large = panel.resize((image.width * ZOOM, height), Image.Resampling.NEAREST)
        row.paste(large, (place * step, 0))
        _write(row, (place * step, height + 8), count, SMALL, FAINT)
    end = _write(row, (0, height + LINE), f"{shown.request.prompt}   ", TEXT, INK)
    right = result.response in shown.answers
    answer = result.response + ("" if right else f"   (wrong, it is: {shown.answers[0]})")
    _write(row, (end, height + LINE), answer, TEXT, RIGHT if right else WRONG)
    return row


def _write(on: Image.Image, at: tuple[int, int], text: str, size: int, color: Any) -> int:
    """Write a line of text; returns where it ends."""
    pen, font = ImageDraw.Draw(on), ImageFont.load_default(size)
    pen.text(at, text, fill=color, font=font)
    return at[0] + math.ceil(pen.textlength(text, font=font))


if __name__ == "__main__":
    main()
