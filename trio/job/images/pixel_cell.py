"""A unit's images between stages: pixels of all rows in one Arrow cell, the rest in a header a row.

Ray moves the cell through shared memory as it is, and what comes out are views of it. Loads no
torch.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from trio.engine.request import ProcessedImage

ALIGN = 64
"""Bytes; every array begins at a multiple of it, as Arrow's own buffers do."""
Picture = ProcessedImage | Image.Image


def pack(rows: Sequence[Sequence[Picture]]) -> tuple[pa.LargeBinaryArray, list[bytes]]:
    """The images of a unit's rows as one cell, and for each row the header that tells them apart.

    Decoded images have to be RGB; what stands in their `info` is left out. Rows that have the same
    image object share its pixels.
    """
    headers: list[bytes] = []
    placed: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
    shown = {id(each): _arrays(each) for row in rows for each in row}
    end = 0
    for row in rows:
        arrays: list[pickle.PickleBuffer] = []
        plain = [shown[id(each)] for each in row]
        body = pickle.dumps(plain, protocol=5, buffer_callback=arrays.append)
        places = []
        for array in arrays:
            content = np.frombuffer(array.raw(), np.uint8)
            where = content.ctypes.data, content.size
            if where not in placed:
                placed[where] = end, content
                end += content.size + -content.size % ALIGN
            start, _ = placed[where]
            places.append((start, start + content.size))
        headers.append(pickle.dumps((body, places)))
    data = pa.allocate_buffer(end)
    cell = np.frombuffer(data, np.uint8)
    for start, content in placed.values():
        stop = start + content.size
        cell[start:stop] = content
        cell[stop : stop + -stop % ALIGN] = 0  # else what stood in that memory before
    return cell_of(data), headers


def _arrays(image: Picture) -> np.ndarray | ProcessedImage:
    """With arrays that pickle takes as they lie in memory."""
    if isinstance(image, Image.Image):
        return np.asarray(image)
    inputs = {name: np.asarray(array, order="C") for name, array in image.inputs.items()}
    return dataclasses.replace(image, inputs=inputs)


def unpack(cell: pa.LargeBinaryArray, header: bytes) -> list[Picture]:
    """The images of one row.

    Arrays of processed images are read-only views of the cell, which they keep alive. Pillow copies
    the pixels of a decoded one.

    Args:
        cell: array of length 1 with what `pack` made, perhaps a slice of a longer one. Taking its
            scalar would copy it.
        header: the row's.
    """
    body, places = pickle.loads(header)
    data = memoryview(bytes_of(cell) if places else b"").toreadonly()
    images = pickle.loads(body, buffers=[data[start:stop] for start, stop in places])
    return [Image.fromarray(each) if isinstance(each, np.ndarray) else each for each in images]


def cell_of(data: pa.Buffer) -> pa.LargeBinaryArray:
    """An array whose only cell is a buffer, without a copy."""
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def bytes_of(cell: pa.LargeBinaryArray) -> pa.Buffer:
    """What the only cell of an array holds, without a copy."""
    _, offsets, data = cell.buffers()
    start, stop = np.frombuffer(offsets, np.int64, 2, offset=8 * cell.offset)
    return data.slice(start, stop - start)
