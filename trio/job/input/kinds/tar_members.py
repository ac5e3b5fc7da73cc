"""The members of a tar by few reads of a store: headers are read, what lies between is passed over.

INPUT a file that is read at offsets; OUTPUT name, offset and size of each regular member.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

BLOCK = 512
HOP, STRIDE = 16 << 10, 1 << 20
# bytes of a read: one that lands behind a large member, and one among small ones
NEAR = 128 << 10
# of a store, bytes that cost less than another request


class NoTar(Exception):
    """The file does not begin as a tar does."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int
    # of its first byte
    size: int
    # bytes
    whole: bool
    # False: the tar ends before it does


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


@dataclass(slots=True)
class TarEnd:
    """How a tar ends, once its members are through."""

    marked: bool = False
    # by blocks of zeros
    damaged: int | None = None
    # offset of something that is no header


def members(file: ReadAhead, end: TarEnd) -> Iterator[Member]:
    """Regular members in their order; the last one may be cut.

    Raises:
        NoTar: not even the first header is one.
    """
    tar = _opened(file)
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # which would grow with the tar
            if member.isfile() and not member.issparse():
                whole = member.offset_data + member.size <= file.size
                yield Member(member.name, member.offset_data, member.size, whole)
                if not whole:
                    return
    except (tarfile.TarError, ValueError, OverflowError):
        # What is behind the end is no header, be it that padding alone is cut off.
        end.damaged = tar.offset if tar.offset < file.size else None
        return
    head = file.read_at(tar.offset, BLOCK)
    if any(head):
        end.damaged = tar.offset
    else:
        end.marked = len(head) == BLOCK


def _opened(file: ReadAhead) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise NoTar(str(error)) from error
