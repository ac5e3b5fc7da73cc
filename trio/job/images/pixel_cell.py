"""A unit's images between stages: pixels of all rows in one Arrow cell, the rest as text of a row.

Ray moves the cell through shared memory as it is, and what comes out are views of it. Loads no
torch.

R runs of equal placeholder tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from trio.engine.request import ProcessedImage

ALIGN = 64
"""Bytes; every array begins at a multiple of it, as Arrow's own buffers do."""
_PIXELS = "rgb"
"""Stands in a header for the pixels of a decoded image."""
Picture = ProcessedImage | Image.Image
_Placed = list[tuple[int, np.ndarray]]
"""Arrays, each with its first byte in the cell."""


def pack(rows: Sequence[Sequence[Picture]]) -> tuple[pa.LargeBinaryArray, list[str]]:
    """The images of a unit's rows as one cell, and for each row the header that tells them apart.

    Decoded images are taken in RGB; what stands in their `info` is left out.
    """
    placed: _Placed = []
    end = 0

    def place(array: np.ndarray) -> list[Any]:
        nonlocal end
        start, end = end, end + array.nbytes + -array.nbytes % ALIGN
        placed.append((start, array))
        return [array.dtype.str, array.shape, start]

    headers = [json.dumps([_header(image, place) for image in row]) for row in rows]
    data = pa.allocate_buffer(end)
    _write(np.frombuffer(data, np.uint8), placed)
    return cell_of(data), headers


def unpack(cell: pa.LargeBinaryArray, header: str) -> list[Picture]:
    """The images of one row.

    Arrays of processed images are read-only views of the cell, which they keep alive. Pillow copies
    the pixels of a decoded one.

    Args:
        cell: array of length 1 with what `pack` made, perhaps a slice of a longer one. Taking its
            scalar would copy it.
        header: the row's.
    """
    images = json.loads(header)
    data = bytes_of(cell) if images else b""
    return [_image(image, data) for image in images]


def _header(image: Picture, place: Callable[[np.ndarray], list[Any]]) -> dict[str, Any]:
    if isinstance(image, Image.Image):
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return {_PIXELS: place(np.asarray(rgb))}
    ids = [(token, len(list(run))) for token, run in groupby(image.input_ids.tolist())]
    arrays = {name: place(array) for name, array in image.inputs.items()}
    return {"ids": ids, "of": image.prompt_images, "arrays": arrays}


def _write(cell: np.ndarray, placed: _Placed) -> None:
    for start, array in placed:
        stop = start + array.nbytes
        cell[start:stop].view(array.dtype).reshape(array.shape)[...] = array
        cell[stop : stop + -stop % ALIGN] = 0  # else what stood in that memory before


def cell_of(data: pa.Buffer) -> pa.LargeBinaryArray:
    """An array whose only cell is a buffer, without a copy."""
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def bytes_of(cell: pa.LargeBinaryArray) -> pa.Buffer:
    """What the only cell of an array holds, without a copy."""
    _, offsets, data = cell.buffers()
    start, stop = np.frombuffer(offsets, np.int64, 2, offset=8 * cell.offset)
    return data.slice(start, stop - start)


def _image(image: dict[str, Any], data: pa.Buffer) -> Picture:
    if _PIXELS in image:
        pixels = _view(image[_PIXELS], data)
        height, width, _ = pixels.shape
        return Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
    ids_R2 = np.array(image["ids"], np.int64).reshape(-1, 2)
    return ProcessedImage(
        input_ids=np.repeat(ids_R2[:, 0], ids_R2[:, 1]),
        inputs={name: _view(place, data) for name, place in image["arrays"].items()},
        prompt_images=image["of"],
    )


def _view(place: list[Any], data: pa.Buffer) -> np.ndarray:
    kind, shape, start = place
    array = np.ndarray(shape, np.dtype(kind), buffer=data, offset=start)
    array.setflags(write=False)
    return array
