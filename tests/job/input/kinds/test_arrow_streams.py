"""Where the record batches of Arrow streams lie."""

from pathlib import Path

import pyarrow as pa
import pytest

from trio.errors import UserError
from trio.job.input.kinds.arrow_streams import Batch, batches_of, opened, read_batch, schema_of
from trio.job.input.kinds.read_ahead import HOP, ReadAhead
from trio.job.input.manifest import inspect
from trio.job.storage import locate

LENGTHS = [3, 0, 100, 7]


def table(start: int, length: int) -> pa.Table:
    numbers = range(start, start + length)
    images = [{"bytes": bytes([n % 256]) * 1000, "path": None} for n in numbers]
    return pa.table({"n": list(numbers), "image": images, "t": [str(n) for n in numbers]})


def write(path: Path, compression: str | None = None) -> pa.Schema:
    schema = table(0, 1).schema
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(path, schema, options=options) as stream:
        for number, length in enumerate(LENGTHS):
            if length:
                stream.write_batch(table(1000 * number, length).to_batches()[0])
            else:
                stream.write_batch(pa.RecordBatch.from_pylist([], schema))
    return schema


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_single_batches_are_those_of_the_stream(tmp_path: Path, compression: str | None) -> None:
    schema = write(tmp_path / "a.arrow", compression)
    with opened(locate(str(tmp_path / "a.arrow"))) as stream:
        file = ReadAhead(stream, stream.size(), far=False)
        batches = list(batches_of(file))
        assert [batch.rows for batch in batches] == LENGTHS
        assert schema_of(stream) == schema
        for number in (3, 2, 0):
            batch = read_batch(stream, batches[number], schema, ["t", "image"])
            whole = table(1000 * number, LENGTHS[number]).to_batches()[0]
            assert batch.to_pydict() == whole.select(["t", "image"]).to_pydict()
    if compression is None:
        assert file.bytes_read <= (len(LENGTHS) + 2) * HOP < stream_size(tmp_path)


def stream_size(folder: Path) -> int:
    return (folder / "a.arrow").stat().st_size


def found(path: Path) -> list[Batch]:
    with opened(locate(str(path))) as stream:
        return list(batches_of(ReadAhead(stream, stream.size(), far=False)))


def test_a_stream_that_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write(path)
    data = path.read_bytes()
    for size in (3, 30, len(data) // 2, len(data) - 200):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="it ends"):
            found(path)


def test_damaged_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write(path)
    data = path.read_bytes()
    message = pa.ipc.read_message(data)
    length = int.from_bytes(data[4:8], "little")
    path.write_bytes(data[:8] + b"\xff" * length + data[8 + length :])
    with pytest.raises(UserError, match=r"a\.arrow: not a readable Arrow stream \(damaged"):
        inspect([str(path)], say=lambda _: None)
    second = 8 + length + (message.body.size if message.body else 0)
    size = len(pa.ipc.read_message(data[second:]).body)
    end = second + 8 + int.from_bytes(data[second + 4 : second + 8], "little")
    head = data[second:end]
    assert head.count(size.to_bytes(8, "little")) == 1
    back = (second - end).to_bytes(8, "little", signed=True)
    path.write_bytes(data[:second] + head.replace(size.to_bytes(8, "little"), back) + data[end:])
    with pytest.raises(ValueError, match="damaged metadata at byte"):
        found(path)


def test_what_is_no_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    with pa.ipc.new_file(path, pa.schema([("a", pa.int64())])) as file:
        file.write_batch(pa.RecordBatch.from_pydict({"a": [1]}))
    with pytest.raises(ValueError, match="no Arrow stream"):
        found(path)
    words = pa.table({"a": pa.array(["x", "y"]).dictionary_encode()})
    with pa.ipc.new_stream(path, words.schema) as stream:
        stream.write_table(words)
    with pytest.raises(ValueError, match="dictionary"):
        found(path)
