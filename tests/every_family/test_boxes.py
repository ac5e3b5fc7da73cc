"""What each visual token is said to show of an image, against where the image was changed.

A patch of a dark image is made bright. Which tokens see it is found out by running processor and
tower, whose patches are kept apart, and comparing features; nothing is computed of where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import trio
from tests.every_family.family import FAMILIES
from tests.every_family.test_coordinates import without_attention
from tests.tiny.llava import tiny_llava, tiny_processor
from trio.families.registry import adapt

SIZES = [(120, 60), (50, 140), (133, 125)]
MORE_SIZES = [(96, 96), (37, 41), (61, 190), (230, 70), (331, 320), (9, 14)]
"""Widths and heights."""
SPOTS = [(0, 0), (1, 1), (0.5, 0.5), (0.3, 0.1), (0.05, 0.8)]
MORE_SPOTS = [*SPOTS, (1, 0), (0, 1), (0.7, 0.85), (0.05, 0.45), (0.62, 0.4)]
"""Columns and rows of bright patches, from the first place that they can have to the last."""
DARK, BRIGHT = 20, 235
SMALLEST = {"llava-too-small": 19}
"""Pixels to which an image's longer edge is resized at least, where it is less than 32; nearest
neighbours move an edge by half of one."""


def _llava(**options: Any) -> tuple[Any, Any]:
    """With `images`, another image processor."""
    images = options.pop("images", None)
    sizes = {name: options[name] for name in ("image_size", "strategy") if name in options}
    processor = tiny_processor(**sizes)
    if images is not None:
        processor.image_processor = images
    return tiny_llava(layers=2, max_positions=1024, **options), processor


def _of(name: str) -> tuple[Any, Any]:
    family = FAMILIES[name]()
    return family.model, family.processor


SQUARE = {"height": 32, "width": 32}
CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava-cut": _llava,
    "llava-class-token": lambda: _llava(strategy="full"),
    "llava-rest": lambda: _llava(image_size=35),
    "llava-squared": lambda: _llava(
        images=LlavaImageProcessorPil(
            size={"shortest_edge": 32}, crop_size=SQUARE, do_pad=True, do_center_crop=True
        )
    ),
    "llava-too-small": lambda: _llava(
        images=CLIPImageProcessorPil(size={"shortest_edge": 19}, crop_size=SQUARE)
    ),
    "llava-not-resized": lambda: _llava(
        images=CLIPImageProcessorPil(do_resize=False, crop_size=SQUARE)
    ),
    **{
        name: lambda name=name: _of(name)  # type: ignore[misc]
        for name in ("llava-siglip", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
    },
}


class Seen:
    """Which tokens of an image of one size see what is bright in it."""

    def __init__(self, model: Any, processor: Any, size: tuple[int, int], others: int) -> None:
        self.size = size
        model = without_attention(model)
        # So that a pixel is seen by its own token alone, and not by neighbours as well.
        processor.image_processor.resample = Image.Resampling.NEAREST
        self.adapter: Any = adapt(model)
        self._processor = processor
        self._others = [Image.new("RGB", (64, 48), (DARK,) * 3)] * others
        self._engine = trio.Engine(model, processor, kv_bytes=1 << 24)
        self._before = self._features(np.zeros(size[::-1], bool))
        self.boxes = self._boxes()
        assert self.boxes.shape == (len(self._before), 4) and self.boxes.dtype == np.float32

    def _image(self, bright: np.ndarray) -> Image.Image:
        grey = np.where(bright, BRIGHT, DARK).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")

    def _features(self, bright: np.ndarray) -> torch.Tensor:
        images = [*self._others, self._image(bright)]
        inputs = self.adapter.process_images(self._processor, images)[-1]
        (features,) = self.adapter.encode_images([inputs])
        return features.tokens

    def _boxes(self) -> np.ndarray:
        """In pixels of the image, as the engine explains them."""
        images = (*self._others, self._image(np.zeros(self.size[::-1], bool)))
        sampling = trio.Sampling(max_new_tokens=1)
        request = trio.Request(prompt="what", images=images, explain=True, sampling=sampling)
        (result,) = self._engine.generate([request])
        assert result.error is None and result.explanation is not None
        boxes = result.explanation.boxes[-result.explanation.image_tokens[-1] :]
        known = boxes[~np.isnan(boxes).any(axis=1)]
        assert (known >= 0).all() and (known <= 1).all() and (known[:, 2:] > known[:, :2]).all()
        return boxes * np.array([*self.size, *self.size], np.float32)

    def by(self, bright: np.ndarray) -> np.ndarray:
        """`[N]` bool."""
        return (self._features(bright) != self._before).any(dim=1).numpy()


def rectangle(size: tuple[int, int], spot: tuple[float, float]) -> tuple[int, int, int, int]:
    """A patch of about an eighth of the image's edges: left, top, right, bottom."""
    (width, height), (column, row) = size, spot
    wide, high = max(6, width // 7), max(6, height // 7)
    left, top = round(column * (width - wide)), round(row * (height - high))
    return left, top, left + wide, top + high


def bright(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(size[::-1], bool)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = True
    return mask


def meets(boxes: np.ndarray, box: tuple[float, float, float, float], margin: float) -> np.ndarray:
    """`[N]`, which boxes have more than `margin` pixels of a rectangle along both axes; with a
    negative one, which come as near to it as that."""
    left, top, right, bottom = box
    across = np.minimum(boxes[:, 2], right) - np.maximum(boxes[:, 0], left)
    down = np.minimum(boxes[:, 3], bottom) - np.maximum(boxes[:, 1], top)
    with np.errstate(invalid="ignore"):
        return np.asarray((across > margin) & (down > margin))


def uncovered(mask: np.ndarray, boxes: np.ndarray, margin: float) -> np.ndarray:
    """Pixels of a mask that are more than `margin` away from all boxes."""
    left = mask.copy()
    for box in boxes:
        first = np.floor(box[:2] - margin).astype(int).clip(0)
        last = np.ceil(box[2:] + margin).astype(int)
        left[first[1] : last[1], first[0] : last[0]] = False
    return left


@pytest.mark.parametrize(
    ("case", "others"),
    [*((case, 0) for case in CASES), ("llava_onevision", 1)],
    ids=[*CASES, "llava_onevision-beside"],
)
@pytest.mark.parametrize(
    ("sizes", "spots"),
    [
        pytest.param(SIZES, SPOTS, id="few"),
        pytest.param(MORE_SIZES, MORE_SPOTS, id="more", marks=pytest.mark.slow),
    ],
)
def test_a_bright_patch_is_shown_by_the_tokens_whose_boxes_it_is_in(
    case: str, others: int, sizes: list[tuple[int, int]], spots: list[tuple[float, float]]
) -> None:
    model, processor = CASES[case]()
    found, found_shrunk = 0, case != "llava_onevision" or others
    for size in sizes:
        seen = Seen(model, processor, size, others)
        margin = 1 + max(size) / (2 * SMALLEST.get(case, 32))
        if case == "llava_onevision" and not others:
            # A token of a shrunk grid is made of up to two features along an edge.
            rows, columns = layout = seen.adapter._layout(size[::-1])
            if seen.adapter._shrunk(*layout) != layout:
                margin += max(size[1] / rows, size[0] / columns)
                found_shrunk = True
        for spot in spots:
            box = rectangle(size, spot)
            changed = seen.by(bright(size, box))
            shows = seen.boxes[changed]
            assert not np.isnan(shows).any(), (size, spot)
            assert meets(shows, box, -margin).all(), (size, spot)
            assert not meets(seen.boxes[~changed], box, margin).any(), (size, spot)
            rest = uncovered(bright(size, box), shows, margin)
            assert not rest.any() or not seen.by(rest).any(), (size, spot)
            found += 0 < changed.mean() < 0.6
    assert found >= len(sizes) and found_shrunk
