"""Images of a unit in one Arrow cell and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from trio.engine.request import ProcessedImage
from trio.job.images.pixel_cell import ALIGN, Picture, pack, unpack

KINDS = st.sampled_from([np.dtype(kind) for kind in ("uint8", "int64", "float32", "bool")])
PROCESSED = st.builds(
    ProcessedImage,
    input_ids=st.lists(st.sampled_from([7, 7, 7, 9, 2**40]), max_size=30).map(
        lambda ids: np.array(ids, np.int64)
    ),
    inputs=st.dictionaries(
        st.sampled_from(["pixel_values", "image_sizes", "grid"]),
        arrays.arrays(KINDS, arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)),
    ),
    digest=st.binary(max_size=3),
    prompt_images=st.integers(1, 5),
)
DECODED = st.builds(
    lambda size, red: Image.new("RGB", size, (red, 5, 250)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 255),
)
UNIT = st.lists(st.lists(PROCESSED | DECODED, max_size=4), max_size=5)


def seen(image: Picture) -> Any:
    """All that there is to see of an image, as values that can be compared."""
    if isinstance(image, Image.Image):
        return image.mode, image.size, image.tobytes()
    values = {
        name: (array.dtype, array.shape, array.tobytes()) for name, array in image.inputs.items()
    }
    ids = image.input_ids.dtype, image.input_ids.tolist()
    return *ids, values, image.digest, image.prompt_images


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def processed(count: int, *, ids: int = 3) -> ProcessedImage:
    pixels = np.arange(count, dtype=np.uint8)
    inputs = {"pixel_values": pixels}
    return ProcessedImage(input_ids=np.full(ids, 5), inputs=inputs, digest=b"")


@settings(deadline=None)
@given(UNIT)
def test_what_is_packed_comes_out_again(rows: list[list[Picture]]) -> None:
    cell, headers = pack(rows)
    cell.validate(full=True)
    assert len(cell) == 1 and cell.type == pa.large_binary()
    out = [unpack(cell, header) for header in headers]
    assert [list(map(seen, row)) for row in out] == [list(map(seen, row)) for row in rows]


@settings(deadline=None)
@given(UNIT)
def test_cells_of_several_units_in_one_array(rows: list[list[Picture]]) -> None:
    cell, headers = pack(rows)
    longer = pa.concat_arrays([pa.array([b"before", None], pa.large_binary()), cell, pack([])[0]])
    batch = pa.record_batch({"pixels": longer})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    with pa.ipc.open_stream(sink.getvalue()) as sent:
        (received,) = sent
    moved = received.column(0).slice(2, 1)
    out = [unpack(moved, header) for header in headers]
    assert [list(map(seen, row)) for row in out] == [list(map(seen, row)) for row in rows]


def test_arrays_are_aligned_read_only_views_that_keep_the_cell() -> None:
    cell, headers = pack([[processed(3), processed(100)], [], [processed(7)]])
    data = cell.buffers()[2]
    begin, length = data.address, data.size
    views = [image.inputs["pixel_values"] for h in headers for image in unpack(cell, h)]  # type: ignore[union-attr]
    # each behind its image's placeholders
    assert [address(view) - begin for view in views] == [ALIGN, 3 * ALIGN, 6 * ALIGN]
    assert length == 7 * ALIGN
    assert not any(view.flags.writeable for view in views)
    before = pa.total_allocated_bytes()
    del data, cell
    assert pa.total_allocated_bytes() == before
    assert [view.tolist()[-1] for view in views] == [2, 99, 6]


def test_equal_rows_give_equal_bytes() -> None:
    for _ in range(20):
        np.full(10_000, 255, np.uint8)  # memory that holds something else before
        cell, _ = pack([[processed(1)], [processed(65)]])
        ids = np.full(3, 5).tobytes() + bytes(40)
        wanted = ids + bytes([0]) + bytes(63) + ids + bytes(range(65)) + bytes(63)
        assert cell[0].as_py() == wanted


def test_a_header_does_not_grow_with_pixels() -> None:
    (short,), (long,) = (
        pack([[processed(n, ids=n), Image.new("RGB", (n, n))]])[1] for n in (9, 900)
    )
    assert len(long) <= len(short) + 30


def test_a_header_of_another_unit_is_noticed() -> None:
    small, _ = pack([[processed(3)]])
    _, (header,) = pack([[processed(3_000)]])
    with pytest.raises(ValueError):
        unpack(small, header)


def test_rows_with_the_same_image_share_its_pixels() -> None:
    one, other, decoded = processed(1000), processed(1000), Image.new("RGB", (20, 20))
    cell, headers = pack([[one, decoded], [one], [other, decoded, one], [decoded]])
    alone, _ = pack([[one, decoded]])
    assert len(cell[0].as_py()) == len(alone[0].as_py()) + len(pack([[other]])[0][0].as_py())
    shown = [[seen(image) for image in unpack(cell, header)] for header in headers]
    first, picture = seen(one), seen(decoded)
    assert shown == [[first, picture], [first], [seen(other), picture, first], [picture]]
