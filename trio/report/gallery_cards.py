"""``OUT/gallery`` as what the page draws: thumbnails, and which tokens stayed where.

INPUT the files of the gallery; OUTPUT objects for JSON, bounded in bytes. Boxes, kept tokens and
scores travel as numbers of one or two bytes in base64; equal boxes stand once.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2.utils import htmlsafe_json_dumps

from trio.report.found_run import FoundRun
from trio.report.row_figures import Key
from trio.viz.drawing import ranks

MOST_BYTES = 8_000_000
"""Of all cards, as JSON."""
JSON: Mapping[str, Any] = {"allow_nan": False, "ensure_ascii": False, "separators": (",", ":")}
"""How the page's data is written."""
MOST_TEXT = 4_000
"""Characters of a prompt or an answer."""
NOWHERE = 65_535
"""Of a box: the token shows no place."""
GONE = 255
"""Of a score: the token was gone, or has none."""
OF_KEY = ("row", "prompt_number")
JPEG = b"\xff\xd8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cards:
    """What is shown of the gallery."""

    cards: Sequence[Mapping[str, Any]]
    """One for each prompt, with the answers of all settings."""
    boxes: Sequence[str]
    """That cards name by their number: left, top, right, bottom of each token in 65,534ths of its
    image, little-endian, base64."""
    left_out: int
    """Prompts for which there was no room."""
    damaged: Sequence[str] = ()
    """Files that cannot be read, from the place on where they cannot."""


def gallery_keys(found: FoundRun) -> set[Key]:
    """Of the gallery's rows; none where there is no gallery, or of files that are damaged.

    Raises:
        OSError: a file went meanwhile, or the storage does not answer.
    """
    return {
        (row["row"], row["prompt_number"], row["setting"])
        for row in _rows(found, [], [*OF_KEY, "setting"])
    }


def cards_of(found: FoundRun, also: Mapping[Key, Mapping[str, Any]]) -> Cards:
    """Cards of the gallery, as many as there is room for.

    Args:
        found: the run.
        also: latency and number of stages of each row, from ``rows/``.

    Raises:
        OSError: as `gallery_keys`.
    """
    damaged: list[str] = []
    prompts, held = 0, _Held()
    for _, own in groupby(_rows(found, damaged), key=itemgetter(*OF_KEY)):
        prompts += 1
        held.add(list(own), also)
    boxes: dict[str, int] = {}
    made: list[dict[str, Any]] = []
    room = MOST_BYTES
    for size, card in _in_turn(held.kinds):
        packed = card["boxes"]
        size += len(packed or "") if packed not in boxes else 0
        if size > room:
            continue
        room -= size
        if packed is not None:
            card["boxes"] = boxes.setdefault(packed, len(boxes))
        made.append(card)
    return Cards(
        cards=sorted(made, key=lambda card: (int(card["row"]), card["prompt_number"])),
        boxes=list(boxes),
        left_out=prompts - len(made),
        damaged=damaged,
    )


class _Held:
    """Of each kind the first cards, at most as many as fill the page alone."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        """By kind, cards with their bytes as JSON, boxes not counted."""
        self._room: dict[str, int] = {}
        self._boxes: dict[str, str] = {}

    def add(self, own: Sequence[Mapping[str, Any]], also: Mapping[Key, Mapping[str, Any]]) -> None:
        kind = _kind(own)
        room = self._room.setdefault(kind, MOST_BYTES)
        if room <= 0:
            return
        card = _card(own, also)
        packed = card["boxes"]
        size = json_bytes({**card, "boxes": None})
        self._room[kind] = room - size
        if packed is not None:
            if packed not in self._boxes:
                self._room[kind] -= len(packed)
            card["boxes"] = self._boxes.setdefault(packed, packed)
        self.kinds.setdefault(kind, []).append((size, card))


def json_bytes(value: Any) -> int:
    """Of a value as it stands in the page."""
    return len(htmlsafe_json_dumps(value, **JSON).encode())


def _rows(
    found: FoundRun, damaged: list[str], columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """In the order of the input, a few at a time: their scores are long lists. Names of files that
    cannot be read are added to `damaged`."""
    for path in found.gallery:
        with found.output.filesystem.open_input_file(path) as stream:
            try:
                file = pq.ParquetFile(stream)
                for batch in file.iter_batches(batch_size=16, columns=columns):
                    yield from batch.to_pylist()
            except (OSError, pa.ArrowException):
                damaged.append(path.rpartition("/")[2])


def _in_turn(
    kinds: Mapping[str, Sequence[tuple[int, dict[str, Any]]]],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """One of each kind after the other, so that none takes all the room."""
    for turn in zip_longest(*(kinds[kind] for kind in sorted(kinds))):
        yield from (one for one in turn if one is not None)


def _kind(own: Sequence[Mapping[str, Any]]) -> str:
    """Of a prompt, from all of its answers."""
    responses = {row["response"] for row in own if row["error"] is None}
    if len(responses) > 1 or any(row.get("audit_match") is False for row in own):
        return "disagreement"
    return "error" if any(row["error"] is not None for row in own) else "sample"


def _card(
    own: Sequence[Mapping[str, Any]], also: Mapping[Key, Mapping[str, Any]]
) -> dict[str, Any]:
    first = own[0]
    known = next((row for row in own if row.get("boxes")), None)
    tokens = next((row["image_tokens"] for row in own if row.get("image_tokens")), None)
    sizes = first.get("image_sizes") or []
    return {
        "kind": _kind(own),
        "sampled": any(row["why"] == "sample" for row in own),
        "row": str(first["row"]),
        "prompt_number": first["prompt_number"],
        "id": _cut(first["id"]),
        "prompt": _cut(first["prompt"]),
        "truth": [_cut(answer) for answer in (first.get("answers") or [])[:10]],
        "images": [
            {
                "src": "data:image/jpeg;base64," + base64.b64encode(data).decode(),
                "size": [sizes[n]["width"], sizes[n]["height"]] if n < len(sizes) else None,
            }
            for n, data in enumerate(first.get("thumbnails") or [])
            if data and data.startswith(JPEG)
        ],
        "tokens": tokens,
        "boxes": None if known is None else _boxes(known["boxes"]),
        "answers": [_answer(row, also) for row in own],
    }


def _answer(row: Mapping[str, Any], also: Mapping[Key, Mapping[str, Any]]) -> dict[str, Any]:
    told = also.get((row["row"], row["prompt_number"], row["setting"]), {})
    kept = row.get("kept_tokens") or []
    visual = row.get("visual_tokens") or 0
    # What an encoder kept stands before the stages.
    reduced = told.get("stages") is not None and len(kept) > told["stages"]
    scores = [_scores(one) for one in row.get("saliency") or []]
    return {
        "setting": row["setting"],
        "response": _cut(row["response"]),
        "error": _cut(row["error"]),
        "score": _finite(row.get("score")),
        "audit": _cut(row.get("audit_response")),
        "audit_match": row.get("audit_match"),
        "finish": row["finish_reason"],
        "visual": row.get("visual_tokens"),
        "retention": _finite(row.get("retention")),
        "prompt_tokens": row.get("prompt_tokens"),
        "output_tokens": row.get("output_tokens"),
        "latency_s": told.get("latency_s"),
        "reduced": reduced,
        "kept": [_mask(stage, visual) for stage in kept],
        "counts": [len(stage) for stage in kept],
        "scores": [None] * int(reduced and bool(scores)) + scores,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no others."""
    return value if value is not None and math.isfinite(value) else None


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= MOST_TEXT:
        return text
    return f"{text[:MOST_TEXT]} … ({len(text) - MOST_TEXT:,} more characters)"


def _boxes(flat: Sequence[float | None]) -> str:
    values = np.array(flat, np.float64)
    places = np.where(np.isfinite(values), np.clip(values, 0, 1) * (NOWHERE - 1), NOWHERE)
    return _packed(np.round(places).astype("<u2"))


def _mask(kept: Sequence[int | None], visual: int) -> str:
    """A bit for each visual token, the lowest first."""
    bits = np.zeros(visual, np.uint8)
    places = np.array([one for one in kept if one is not None], np.int64)
    bits[places[places < visual]] = 1
    return _packed(np.packbits(bits, bitorder="little"))


def _scores(values: Sequence[float | None]) -> str | None:
    """By rank, 0 to 254: scores of methods have no common scale."""
    found = np.array(values, np.float64)
    there = np.isfinite(found)
    if not there.any():
        return None
    level = ranks(np.where(there, found, np.nan))
    return _packed(np.where(there, np.round(level * (GONE - 1)), GONE).astype(np.uint8))


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
