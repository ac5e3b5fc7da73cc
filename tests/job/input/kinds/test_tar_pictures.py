"""Pictures out of tars by few reads."""

from typing import Any

import pyarrow as pa
import pytest

from trio.job.input.kinds.tar_pictures import GAP, MOST, pictures
from trio.job.input.kinds.tar_samples import PLACES


class Counted:
    """A file of letters that notes what is read of it."""

    def __init__(self, size: int) -> None:
        self.size, self.reads = size, list[tuple[int, int]]()

    def read_at(self, size: int, offset: int) -> bytes:
        self.reads.append((offset, size))
        return bytes(n % 251 for n in range(offset, min(offset + size, self.size)))


def places(*rows: list[tuple[int, int]] | None) -> pa.ChunkedArray:
    cells: list[Any] = [
        row and [{"path": str(offset), "offset": offset, "size": size} for offset, size in row]
        for row in rows
    ]
    return pa.chunked_array([pa.array(cells, PLACES)])


def test_near_places_are_read_together() -> None:
    stream = Counted(10 * GAP)
    rows = places([(600, 5)], None, [(100, 3), (8 * GAP, 2)], [(100, 3)])
    found = pictures(stream, rows).to_pylist()
    assert found[1] is None and found[3][0] == found[2][0]
    assert found[0] == [{"bytes": bytes(range(98, 103)), "path": "600"}]
    assert found[2][1]["bytes"] == bytes(n % 251 for n in (8 * GAP, 8 * GAP + 1))
    assert stream.reads == [(100, 505), (8 * GAP, 2)]


def test_a_read_is_not_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio.job.input.kinds.tar_pictures.MOST", 1000)
    stream = Counted(5000)
    pictures(stream, places([(0, 600)], [(600, 600)], [(1200, 300)]))
    assert stream.reads == [(0, 600), (600, 900)] and MOST > GAP


def test_a_tar_that_ends_before_a_picture() -> None:
    with pytest.raises(OSError, match="it ends at byte 50"):
        pictures(Counted(50), places([(40, 20)]))
