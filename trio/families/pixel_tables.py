"""Stops an image processor at uint8 pixels, and makes the model's floats of them elsewhere.

Rescaling and normalising look at one value of one channel at a time, so a table of what they make
of each of the 256 values gives the processor's own floats bit for bit. So pixels travel as uint8,
an eighth to a quarter of the bytes, as far as the device that the tower is on.

C channels; M images, tiles or patches in a tensor, each with K values of a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trio.decoder.gpu import sent
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

    def tensors(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """What `to_uint8` gave as tensors, its pixels still uint8.

        Raises:
            ValueError: pixels are missing, or not uint8 in a known layout.
        """
        for name in self.tables:
            if name not in inputs or inputs[name].dtype != np.uint8:
                raise ValueError(f"it has no {name} of uint8")
            _rows(name, inputs[name].shape)
        # Copied: they may be read-only, and lie in memory that is shared with other processes.
        return {name: torch.tensor(array) for name, array in inputs.items()}

    def finish(self, images: Sequence[Inputs], device: torch.device) -> list[dict[str, Tensor]]:
        """The tensors of the whole processor, those of pixels on the device, which all images' go
        to at once."""
        made = [dict(image) for image in images]
        for name in self.tables:
            for image, floats in zip(made, self._looked_up(name, images, device), strict=True):
                image[name] = floats
        return made

    def _looked_up(
        self, name: str, images: Sequence[Inputs], device: torch.device
    ) -> Iterator[Tensor]:
        rows = [image[name].reshape(_rows(name, image[name].shape)) for image in images]
        pixels_MCK = sent(torch.cat(rows), device)
        start_C1 = torch.arange(0, _CHANNELS * _VALUES, _VALUES, dtype=torch.int32, device=device)
        index = (pixels_MCK + start_C1[:, None]).flatten()
        table = sent(torch.from_numpy(self.tables[name]), device)
        floats = table.index_select(0, index).view(pixels_MCK.shape)
        parts = floats.split([len(own) for own in rows])
        return (part.view(image[name].shape) for part, image in zip(parts, images, strict=True))


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


def finished(images: Sequence[Inputs], device: torch.device) -> list[Inputs]:
    """Images with floats for pixels: those of which some are still uint8, which have `tables`, on
    the device, the others' as well, so that all can be put together; else as they are."""
    made = list(images)
    by_tables: dict[int, list[int]] = {}
    names: set[str] = set()
    for place, image in enumerate(images):
        if (tables := getattr(image, "tables", None)) is not None:
            by_tables.setdefault(id(tables), []).append(place)
            names |= tables.tables.keys()
    for places in by_tables.values():
        own: list[Any] = [images[place] for place in places]
        for place, image in zip(places, own[0].tables.finish(own, device), strict=True):
            made[place] = image
    if not names:
        return made
    return [
        {name: sent(x, device) if name in names else x for name, x in image.items()}
        for image in made
    ]


def _index(name: str, pixels: np.ndarray) -> np.ndarray:
    """`[M, C, K]` uint16, for each pixel its place in a table."""
    rows_MCK = pixels.reshape(_rows(name, pixels.shape))
    return rows_MCK + (np.arange(_CHANNELS, dtype=np.uint16) * _VALUES)[:, None]


def _rows(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape `[M, C, K]` of pixels. The first is -1.

    Known are `[..., C, height, width]` of images and tiles, and `[M, C * K]` of flat patches.
    """
    known = False
    if len(shape) >= 4:
        known = shape[-3] == _CHANNELS
    elif len(shape) == 2:
        known = shape[-1] % _CHANNELS == 0
    if not known:
        raise CannotCut(f"{name} {list(shape)} has no known place of the channels")
    count = shape[-2] * shape[-1] if len(shape) >= 4 else shape[-1] // _CHANNELS
    return -1, _CHANNELS, count


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
