"""Prompts with videos, as the processors write them: these need torchvision for videos.

A prompt is told by letters: w is a word, i an image, v a video.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from math import prod
from typing import Any

import torch
from torch import Tensor

from tests.tiny.llava_onevision import SIDE
from tests.tiny.qwen2_5_vl import SPECIAL
from trio.families.llava_onevision import LlavaOnevisionAdapter

Inputs = dict[str, Any]
GRIDS = ((1, 8, 6), (1, 4, 10), (1, 12, 12))
"""Frames, rows and columns of patches of images, in turn."""
VIDEO_GRIDS = ((3, 6, 8), (1, 8, 8), (4, 4, 6), (2, 10, 4))
SECONDS = (0.5, 2.0, 1.0)
"""Between the pairs of frames of a video."""
SIZES = ((44, 88), (40, 44), (90, 30))
"""Heights and widths of images."""
FRAME_TOKENS = 9
"""Of LLaVA-OneVision."""
START, END = SPECIAL.index("<|vision_start|>"), SPECIAL.index("<|vision_end|>")


@dataclass(slots=True)
class Row:
    """A batch of one. spans: of images and runs of a video, told while writing. videos: spans that
    are a video's."""

    inputs: Inputs
    spans: list[tuple[int, int]]
    videos: list[int]


@dataclass(slots=True)
class Writer(ABC):
    """Writes the prompts of one model, each with other images."""

    model: Any
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(11))
    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    videos: list[int] = field(default_factory=list)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def rows(self, prompts: Sequence[str]) -> list[Row]:
        return [self._row(prompt) for prompt in prompts]

    def _row(self, prompt: str) -> Row:
        self.ids, self.kinds, self.spans, self.videos, self.inputs = [], [], [], [], {}
        for letter in prompt:
            if letter == "w":
                self.words(1)
            else:
                self.visual(letter == "v", prompt.count("i"))
        inputs: Inputs = {name: torch.cat(values) for name, values in self.inputs.items()}
        inputs["input_ids"] = torch.tensor([self.ids])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        self.complete(inputs, prompt.count("i"))
        return Row(inputs, self.spans, self.videos)

    def words(self, count: int) -> None:
        self.put(torch.randint(10, 80, (count,), generator=self.generator).tolist(), 0)

    def put(self, ids: list[int], kind: int) -> None:
        """kind: 0 text, 1 image, 2 video."""
        if kind:
            self.spans.append((len(self.ids), len(self.ids) + len(ids)))
            self.videos += [len(self.spans) - 1] * (kind == 2)
        self.ids += ids
        self.kinds += [kind] * len(ids)

    def give(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.inputs.setdefault(name, []).append(tensor)

    def pixels(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    @abstractmethod
    def visual(self, video: bool, images: int) -> None:
        """An image or a video, of a prompt with so many images."""

    @abstractmethod
    def complete(self, inputs: Inputs, images: int) -> None:
        """What the model takes beside ids and pixels."""


@dataclass(slots=True)
class QwenWriter(Writer):
    """slices: whether a video's frames are apart, a time before each."""

    slices: bool = False
    grids: Iterator[tuple[int, ...]] = field(default_factory=lambda: cycle(GRIDS))
    video_grids: Iterator[tuple[int, ...]] = field(default_factory=lambda: cycle(VIDEO_GRIDS))
    seconds: Iterator[float] = field(default_factory=lambda: cycle(SECONDS))

    def visual(self, video: bool, images: int) -> None:
        grid = next(self.video_grids if video else self.grids)
        config = self.model.config
        pad = config.video_token_id if video else config.image_token_id
        times = grid[0] if video and self.slices else 1
        for _ in range(times):
            self.words(2 if video and self.slices else 0)
            self.put([START], 0)
            self.put([pad] * (prod(grid) // 4 // times), 2 if video else 1)
            self.put([END], 0)
        vision = config.vision_config
        numbers = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels, thw = self.pixels(prod(grid), numbers), torch.tensor([grid])
        if not video:
            self.give(pixel_values=pixels, image_grid_thw=thw)
            return
        self.give(pixel_values_videos=pixels, video_grid_thw=thw)
        if not self.slices:
            self.give(second_per_grid_ts=torch.tensor([next(self.seconds)]))

    def complete(self, inputs: Inputs, images: int) -> None:
        inputs["mm_token_type_ids"] = torch.tensor([self.kinds])


@dataclass(slots=True)
class OnevisionWriter(Writer):
    """frames: of each video, as all videos of a batch have as many."""

    frames: int = 3
    sizes: Iterator[tuple[int, int]] = field(default_factory=lambda: cycle(SIZES))

    def visual(self, video: bool, images: int) -> None:
        config, adapter = self.model.config, LlavaOnevisionAdapter(self.model)
        if video:
            self.give(pixel_values_videos=self.pixels(1, self.frames, 3, SIDE, SIDE))
            self.put([config.video_token_id] * (self.frames * FRAME_TOKENS + 1), 2)
            return
        size = torch.tensor([next(self.sizes)])
        told = {"image_sizes": size.expand(images, 2), "batch_num_images": [images]}
        self.put([config.image_token_id] * adapter.visual_tokens(told)[0], 1)
        self.give(pixel_values=self.pixels(1, adapter.tiles(told)[0], 3, SIDE, SIDE))
        self.give(image_sizes=size)

    def complete(self, inputs: Inputs, images: int) -> None:
        if images:
            inputs["batch_num_images"] = torch.tensor([images])


WRITERS: dict[str, Callable[[Any], Writer]] = {
    "llava_onevision": OnevisionWriter,
    "qwen2_5_vl": QwenWriter,
    "qwen3_vl": lambda model: QwenWriter(model, slices=True),
}


def joined(rows: Sequence[Row], side: str = "left") -> Inputs:
    """The rows as one batch, padded on one side."""
    singles = [row.inputs for row in rows]
    batch: Inputs = {}
    for name in dict.fromkeys(name for single in singles for name in single):
        tensors = [single[name] for single in singles if name in single]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            tensors = _padded(tensors, 1, side)
        elif name == "pixel_values" and tensors[0].ndim == 5:
            tensors = _padded(tensors, 1, "right")  # tiles
        batch[name] = torch.cat(tensors)
    return batch


def _padded(tensors: Sequence[Tensor], dim: int, side: str) -> list[Tensor]:
    width = max(tensor.shape[dim] for tensor in tensors)
    padded = []
    for tensor in tensors:
        shape = list(tensor.shape)
        shape[dim] = width - shape[dim]
        parts = [tensor.new_zeros(shape), tensor]
        padded.append(torch.cat(parts if side == "left" else parts[::-1], dim=dim))
    return padded
