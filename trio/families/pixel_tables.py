"""Stops an image processor at uint8 pixels, and makes the model's floats of them elsewhere.

Rescaling and normalising look at one value of one channel at a time, so a table of what they make
of each of the 256 values gives the processor's own floats bit for bit.

C channels; M images, tiles or patches in a tensor, each with K values of a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trio.errors import UserError, kind_and_line

if TYPE_CHECKING:
    from trio.families.adapter import Inputs

UNFINISHED = {"do_rescale": False, "do_normalize": False}
"""Options with which a processor of transformers stops at uint8 pixels."""
_CHANNELS = 3
_VALUES = 256
_SIZES = ((61, 37), (190, 23), (11, 90), (420, 330))
"""Width and height of probe images: odd, wide and tall ones that are padded or cut, a large one."""
_BLOCKS = 4
"""Flat squares along an edge of a probe image; the inside of each survives resizing."""

Process = Callable[..., "list[Inputs]"]
"""`Adapter.process_images` with its processor: images of a prompt, then options."""


class CannotCut(UserError):
    """The processor cannot be stopped at uint8 pixels; says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelTables:
    """What a processor makes of each value of its pixels."""

    tables: Mapping[str, np.ndarray]
    """For each tensor of pixels `[C * 256]`, in the dtype that the model takes."""

    def to_uint8(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """What an unfinished run of the processor made of an image, with pixels as uint8.

        Raises:
            CannotCut: these are no whole numbers from 0 to 255.
        """
        return {
            name: _uint8(name, tensor) if name in self.tables else tensor.numpy()
            for name, tensor in inputs.items()
        }

    def finish(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """The tensors of the whole processor, on the CPU, of what `to_uint8` gave.

        Raises:
            ValueError: pixels are missing, or not uint8 in a known layout.
        """
        for name in self.tables:
            if name not in inputs or inputs[name].dtype != np.uint8:
                raise ValueError(f"it has no {name} of uint8")
        return {
            name: torch.from_numpy(_floats(self.tables[name], name, array))
            if name in self.tables
            else torch.tensor(array)  # copied: a few numbers, and perhaps read-only
            for name, array in inputs.items()
        }


def learn(process: Process) -> PixelTables:
    """Tables of a processor, read off what it makes of probe images in whole and unfinished runs.

    Raises:
        CannotCut: floats do not follow from uint8 pixels value by value, or anything else differs.
    """
    learner = _Learner(process)
    for images in _probes():
        learner.look(images)
    while (missing := learner.missing()).size:
        learner.look([_flat(missing)])
        left = learner.missing()
        if len(left) == len(missing):
            raise CannotCut(f"pixels of {len(left)} values never come out of it, as {left[0]}")
    return PixelTables(tables=learner.tables)


class _Learner:
    """Fills tables from pairs of runs, and compares each pair with them."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.tables: dict[str, np.ndarray] = {}
        self._seen: dict[str, np.ndarray] = {}

    def look(self, images: list[Image.Image]) -> None:
        whole, cut = self._run(images), self._run(images, **UNFINISHED)
        for one, other in zip(whole, cut, strict=True):
            if one.keys() != other.keys():
                raise CannotCut("without rescaling and normalising it gives other tensors")
            for name in one:
                self._compare(name, one[name], other[name])

    def missing(self) -> np.ndarray:
        """Values that some channel has not shown yet."""
        if not self._seen:
            return np.empty(0, np.intp)
        shown = np.concatenate([seen.reshape(-1, _VALUES) for seen in self._seen.values()])
        return np.flatnonzero(~shown.all(0))

    def _run(self, images: list[Image.Image], **options: bool) -> list[Inputs]:
        try:
            return self._process(images, **options)
        except Exception as fault:  # what a processor raises is not documented
            how = " without rescaling and normalising" if options else ""
            raise CannotCut(f"a probe{how} fails: {kind_and_line(fault)}") from fault

    def _compare(self, name: str, whole: Any, cut: Any) -> None:
        if not (isinstance(whole, Tensor) and isinstance(cut, Tensor)):
            raise CannotCut(f"{name} is no tensor")
        if whole.shape != cut.shape:
            raise CannotCut(f"{name} has another shape without rescaling and normalising")
        if whole.is_floating_point():
            self._fill(name, whole.numpy(), _uint8(name, cut))
        elif whole.dtype != cut.dtype or not torch.equal(whole, cut):
            raise CannotCut(f"{name} is another without rescaling and normalising")

    def _fill(self, name: str, floats: np.ndarray, pixels: np.ndarray) -> None:
        index_MCK = _index(name, pixels)
        floats_MCK = floats.reshape(index_MCK.shape)
        size = _CHANNELS * _VALUES
        table = self.tables.setdefault(name, np.zeros(size, floats.dtype))
        seen = self._seen.setdefault(name, np.zeros(size, bool))
        new_MCK = ~seen[index_MCK]
        table[index_MCK[new_MCK]] = floats_MCK[new_MCK]
        seen[index_MCK] = True
        # Bytes, as floats of different bits may be equal.
        if floats.dtype != table.dtype or table[index_MCK].tobytes() != floats_MCK.tobytes():
            raise CannotCut(f"{name} does not follow from uint8 pixels value by value")


def _floats(table: np.ndarray, name: str, pixels: np.ndarray) -> np.ndarray:
    # Indices are in range; numpy's other modes are slower.
    return np.take(table, _index(name, pixels), mode="clip").reshape(pixels.shape)


def _index(name: str, pixels: np.ndarray) -> np.ndarray:
    """`[M, C, K]` uint16, for each pixel its place in a table.

    Known are `[..., C, height, width]` of images and tiles, and `[M, C * K]` of flat patches.
    """
    shape, known = pixels.shape, False
    if len(shape) >= 4:
        known = shape[-3] == _CHANNELS
    elif len(shape) == 2:
        known = shape[-1] % _CHANNELS == 0
    if not known:
        raise CannotCut(f"{name} {list(shape)} has no known place of the channels")
    count = shape[-2] * shape[-1] if len(shape) >= 4 else shape[-1] // _CHANNELS
    rows_MCK = pixels.reshape(-1, _CHANNELS, count)
    return rows_MCK + (np.arange(_CHANNELS, dtype=np.uint16) * _VALUES)[:, None]


def _uint8(name: str, pixels: Tensor) -> np.ndarray:
    """Pixels as uint8; some processors have turned them into floats on the way."""
    exact = pixels.to(torch.uint8)
    if exact is not pixels and not torch.equal(exact.to(pixels.dtype), pixels):
        raise CannotCut(f"{name} is not uint8 without rescaling and normalising")
    return exact.numpy()


def _probes() -> Iterator[list[Image.Image]]:
    """Noise, each image alone and all as those of one prompt."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, _VALUES, (height, width, _CHANNELS), dtype=np.uint8))
        for width, height in _SIZES
    ]
    yield from ([image] for image in images)
    yield images


def _flat(values: np.ndarray) -> Image.Image:
    """Grey squares, each of one of the first of these values."""
    grid = np.resize(values, (_BLOCKS, _BLOCKS)).astype(np.uint8)
    return Image.fromarray(grid.repeat(16, 0).repeat(16, 1)).convert("RGB")
