"""The members of a tar by few reads of a store: headers are read, what lies between is passed over.

INPUT a file that is read at offsets; OUTPUT name, offset and size of each regular member.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from trio.job.input.kinds.read_ahead import ReadAhead

BLOCK = 512


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
            tar.members.clear()  # type: ignore[attr-defined]  # they would grow with the tar
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
