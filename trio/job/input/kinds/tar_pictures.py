"""Pictures of tars, by few reads: places that lie near each other are read together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from trio.job.input.kinds.tar_samples import PICTURES

GAP, MOST = 256 << 10, 32 << 20
# bytes between two places, and bytes in all, that one read may have


def pictures(stream: pa.NativeFile, places: pa.ChunkedArray) -> pa.Array:
    """The bytes of each row's pictures; the tar's stream is read at their places.

    Raises:
        OSError: the tar ends before one of them.
    """
    rows = places.to_pylist()
    wanted = {(place["offset"], place["size"]) for row in rows if row for place in row}
    data: dict[tuple[int, int], bytes] = {}
    for start, stop, some in _reads(sorted(wanted)):
        read = stream.read_at(stop - start, start)
        if len(read) < stop - start:
            raise OSError(f"it ends at byte {start + len(read)}, before a picture does")
        for offset, size in some:
            data[offset, size] = read[offset - start : offset - start + size]
    cells = [row and [_cell(place, data) for place in row] for row in rows]
    return pa.array(cells, PICTURES)


def _cell(place: Mapping[str, Any], data: Mapping[tuple[int, int], bytes]) -> dict[str, Any]:
    return {"bytes": data[place["offset"], place["size"]], "path": place["path"]}


def _reads(
    places: Sequence[tuple[int, int]],
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """First byte, byte after the last one, and the places in between."""
    some: list[tuple[int, int]] = []
    for offset, size in places:
        end = sum(some[-1]) if some else offset
        if some and (offset - end > GAP or offset + size - some[0][0] > MOST):
            yield some[0][0], end, some
            some = []
        some.append((offset, size))
    if some:
        yield some[0][0], sum(some[-1]), some
