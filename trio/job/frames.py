"""Messages between two processes over a pipe: a JSON header, then the bytes that it announces.

INPUT a mapping and buffers; OUTPUT the same on the other side. No pickle: what a process that
decodes foreign files sends is data to its reader, whatever became of it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

PREFIX = struct.Struct(">I")
# length of the header
SIZES = "sizes"
# of the buffers, in the header


def pack(header: Mapping[str, Any], sizes: Sequence[int]) -> bytes:
    """What goes before buffers of these sizes."""
    text = json.dumps({**header, SIZES: list(sizes)}, separators=(",", ":")).encode()
    return PREFIX.pack(len(text)) + text


def parse(text: bytes | bytearray) -> dict[str, Any]:
    """The header in the bytes that follow the prefix."""
    header: dict[str, Any] = json.loads(text)
    return header


def read(stream: BinaryIO) -> tuple[dict[str, Any], list[bytes]]:
    """The next message of a blocking stream.

    Raises:
        EOFError: the other side is gone.
    """
    (length,) = PREFIX.unpack(_exactly(stream, PREFIX.size))
    header = parse(_exactly(stream, length))
    return header, [_exactly(stream, size) for size in header[SIZES]]


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
