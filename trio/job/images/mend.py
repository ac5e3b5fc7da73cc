"""Encoded images without what stands beside their pixels, and JPEGs with the end that they lack.

A picture is no worse for damaged text, profiles or thumbnails in its file, so what Pillow refuses
for those is read without them. No Pillow here: bytes in, bytes out.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from itertools import product

Buffer = bytes | bytearray | memoryview
BARE = "read without data beside its pixels (text, profile, EXIF), which is damaged or too large"
NO_END = "the file lacks its end marker"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_RASTER_TAGS = frozenset(
    {254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323}
    | {324, 325, 332, 338, 339, 340, 341, 347, *range(512, 522), 529, 530, 531, 532}
)
# of TIFF: what says how pixels are stored and what they mean
_ORIENTATION = 274
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_RESTARTS, _TEM, _SOS, _COMMENT = range(0xD0, 0xD8), 0x01, 0xDA, 0xFE
_BESIDE = {*range(0xE2, 0xEE), 0xEF, _COMMENT}
# APP2 to APP13 and APP15; APP0 and APP14 say what the colours are, APP1 which way is up
_EXIF = 0xE1
_PROGRESSIVE = {0xC2, 0xCA}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_NEXT = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_FILLERS = (37, 101, 181)
# factors of the patterns that stand in for missing data


def unfinished(data: Buffer) -> str | None:
    """A note where a PNG or JPEG that was read lacks its end."""
    if data[:8] == _PNG:
        there = data[-12:] == _PNG_END or _PNG_END in bytes(data)
    elif data[:3] == _SOI + b"\xff":
        there = data[-2:] == _EOI or any(m == 0xD9 for m, _, _ in _segments(bytes(data)))
    else:
        there = True
    return None if there else NO_END


def bare(data: Buffer, *, orientation: bool) -> bytes | None:
    """The image without what stands beside its pixels, but with its orientation where asked.

    None where nothing can be left out: other formats, files damaged elsewhere.
    """
    data = bytes(data)
    try:
        if data[:8] == _PNG:
            out = _bare_png(data, orientation)
        elif data[:3] == _SOI + b"\xff":
            out = _bare_jpeg(data, orientation)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            out = _bare_webp(data, orientation)
        elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            out = _bare_tiff(data, orientation)
        else:
            return None
    except (
        struct.error,
        IndexError,
        OverflowError,
    ):  # offsets and lengths that lead outside of the file
        return None
    return out if out != data else None


def _bare_png(data: bytes, orientation: bool) -> bytes:
    """Critical chunks and transparency; EXIF as orientation. An ancillary one has to be whole."""
    parts, at = [_PNG], 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk, at = data[at : at + 12 + length], at + 12 + length
        whole = len(chunk) == 12 + length and _checks(chunk)
        wanted = kind == b"tRNS" or (orientation and _turns_png(kind, chunk[8:-4]))
        if not kind[0] & 0x20 or (wanted and whole):
            parts.append(chunk)
        if kind == b"IEND":
            break
    return b"".join(parts)


def _checks(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _turns_png(kind: bytes, body: bytes) -> bool:
    """Whether a chunk may say which way is up: EXIF, or short text of the two kinds that do."""
    keyword, _, rest = body[:80].partition(b"\0")
    if kind == b"iTXt" and keyword == b"XML:com.adobe.xmp":
        return rest[:1] == b"\0" or _expands_little(body[20:].split(b"\0", 2)[-1])
    if kind == b"zTXt" and keyword == b"Raw profile type exif":
        return _expands_little(body[23:])
    return kind == b"eXIf" or (kind == b"tEXt" and keyword == b"Raw profile type exif")


def _expands_little(packed: bytes, most: int = 1 << 20) -> bool:
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(packed, most)
    except zlib.error:
        return False
    return not inflate.unconsumed_tail


def _bare_jpeg(data: bytes, orientation: bool) -> bytes:
    drop = _BESIDE if orientation else _BESIDE | {_EXIF}
    parts = [_SOI]
    for marker, start, stop in _segments(data):
        if marker == _SOS:
            return b"".join([*parts, data[start:]])
        if marker not in drop:
            parts.append(data[start:stop])
    return data


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and stop of each of a JPEG's segments; a scan's ends behind its pixels.

    The stop lies behind the file's end where the last segment is cut.
    """
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker in (0x00, 0xFF):  # filling
            at += 1
            continue
        stop = at + 2
        if marker not in (*_RESTARTS, _TEM, 0xD8, 0xD9):
            stop += max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        if marker == _SOS:
            stop = _behind_scan(data, stop)
        yield marker, at, stop
        at = stop


def _behind_scan(data: bytes, at: int) -> int:
    """Where the next marker stands that is no restart; the file's end where there is none."""
    match = _NEXT.search(data, at)
    return match.start() if match else len(data)


def ended(data: Buffer) -> list[bytes]:
    """A JPEG that lacks its end marker with one, once plainly and then behind patterns of bits.

    Nothing behind the last pixel is looked at. So if all of them show the same picture, no pixel
    is missing; if bits are missing, the patterns are taken for them. Empty where the end is there
    or whole scans are missing.
    """
    data = bytes(data)
    try:
        if data[:3] != _SOI + b"\xff" or not _all_scans(data):
            return []
    except (IndexError, ValueError):  # a header is cut
        return []
    whole = data.removesuffix(b"\xff")
    restarts = _RESTART.findall(whole, whole.rindex(b"\xff\xda"))
    due = restarts[-1][1] - 0xD0 + 1 if restarts else 0
    return [whole + _EOI, *(whole + _pattern(factor, due) + _EOI for factor in _FILLERS)]


def _pattern(factor: int, due: int) -> bytes:
    """Bits without a marker, then more behind restart markers from the one that is due.

    Decoders wait for that one, and pass over bits before it.
    """
    bits = bytes(n * factor % 251 for n in range(1, 251))
    markers = (bytes([0xFF, 0xD0 + n % 8]) for n in range(due, due + 16))
    return bits + b"".join(marker + bits for marker in markers)


def _all_scans(data: bytes) -> bool:
    """Whether a JPEG ends in a scan, and its scans bring every coefficient in full precision."""
    missing: set[tuple[int, int]] = set()
    progressive, segments = False, list(_segments(data))
    for marker, start, _ in segments:
        if marker == 0xD9:
            return False
        if marker in _FRAMES:
            progressive = marker in _PROGRESSIVE
            names = data[start + 10 : start + 10 + 3 * data[start + 9] : 3]
            missing = set(product(names, range(64 if progressive else 1)))
        elif marker == _SOS:
            count = data[start + 4]
            names = data[start + 5 : start + 5 + 2 * count : 2]
            low, high, depth = data[start + 5 + 2 * count :][:3] if progressive else (0, 0, 0)
            if depth & 15 == 0:
                missing -= set(product(names, range(low, high + 1)))
    return not missing and segments[-1][0] == _SOS and segments[-1][2] == len(data)


def _bare_webp(data: bytes, orientation: bool) -> bytes:
    keep = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
    keep |= {b"EXIF"} if orientation else set()
    parts, at = [], 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        chunk, at = data[at : at + 8 + length], at + 8 + length + length % 2
        if kind in keep and (len(chunk) == 8 + length or kind != b"EXIF"):
            parts.append(_flagged(chunk) if kind == b"VP8X" else chunk)
            parts.append(b"\0" * (length % 2))
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _flagged(chunk: bytes) -> bytes:
    """The header of a WebP with no flags but those of transparency, animation and EXIF."""
    return chunk[:8] + bytes([chunk[8] & 0x1A]) + chunk[9:]


def _bare_tiff(data: bytes, orientation: bool) -> bytes:
    """With the raster's tags only in the directory of its first picture, which stays in its place.

    Nothing is put behind the end: where pixels are missing it would be taken for them.
    """
    order, big = ("<" if data[:2] == b"II" else ">"), 43 in data[2:4]
    offset, count, size = ("Q", "Q", 20) if big else ("I", "H", 12)
    (start,) = struct.unpack_from(order + offset, data, 8 if big else 4)
    (entries,) = struct.unpack_from(order + count, data, start)
    first = start + struct.calcsize("=" + count)
    if first + entries * size > len(data):
        return data
    table = [data[at : at + size] for at in range(first, first + entries * size, size)]
    tags = _RASTER_TAGS | ({_ORIENTATION} if orientation else set())
    kept = [entry for entry in table if struct.unpack_from(order + "H", entry)[0] in tags]
    if len(kept) == entries:
        return data
    directory = struct.pack(order + count, len(kept)) + b"".join(kept)
    directory += struct.pack(order + offset, 0)
    return data[:start] + directory + data[start + len(directory) :]
