"""Small reads of a file, served from blocks that are read ahead: a store answers few requests."""

from __future__ import annotations

import io

import pyarrow as pa

HOP, STRIDE = 16 << 10, 1 << 20
# bytes of a read: one that lands far behind the last one, and one that goes on there
NEAR = 128 << 10
# of a store, bytes that cost less than another request


class ReadAhead(io.RawIOBase):
    """A file whose small reads are served from blocks."""

    def __init__(self, stream: pa.NativeFile, size: int, *, far: bool) -> None:
        """`far`: each read is a request."""
        super().__init__()
        self._stream, self.size, self._far = stream, size, far
        self._start, self._block = 0, b""
        self._place = 0
        self.bytes_read = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._place = offset
        return offset

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        data = self.read_at(self._place, size)
        self._place += len(data)
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """Fewer bytes only at the end of the file."""
        stop = min(offset + size, self.size)
        end = self._start + len(self._block)
        if offset < self._start or stop > end:
            near = self._far and self._start <= offset < end + NEAR
            length = max(stop - offset, STRIDE if near else HOP)
            self._start = offset
            self._block = self._stream.read_at(min(length, max(self.size - offset, 0)), offset)
            self.bytes_read += len(self._block)
        return self._block[offset - self._start : max(stop, offset) - self._start]
