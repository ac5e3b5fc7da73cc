"""PNGs without what stands beside their pixels, and JPEGs with something behind their pixels.

A picture is no worse for damaged text or profiles in its file, or for a missing end, where all its
pixels are there. No Pillow here: bytes in, bytes out.
"""

from __future__ import annotations

import zlib

BARE = "read without data beside its pixels (text, profile, EXIF), which is damaged or too large"
NO_END = "the file lacks its end marker"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_SCAN, _BESIDE = 0xDA, {*range(0xE2, 0xEE), 0xEF, 0xFE}
# markers: the start of pixels; APP2 to APP13, APP15 and comments
_PADDING = 64
# bytes: more than a decoder reads ahead
_FACTORS = (0, 37, 101, 181)
# of the patterns of bits that stand in for what may be missing


def unfinished(data: bytes) -> bool:
    """Whether a PNG or JPEG has no end marker."""
    end = _PNG_END if data.startswith(_PNG) else _JPEG_END if data.startswith(_JPEG) else b""
    return data.rfind(end) < 0  # from behind: there it is, in nearly every file


def bare_png(data: bytes) -> bytes | None:
    """A PNG's critical chunks, and where they are whole transparency and EXIF, which says which way
    is up. None for other formats, and where nothing can be left out."""
    if not data.startswith(_PNG):
        return None
    parts, at = [_PNG], len(_PNG)
    while at + 8 <= len(data):
        kind, stop = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        whole = zlib.crc32(data[at + 4 : stop - 4]).to_bytes(4, "big") == data[stop - 4 : stop]
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and whole):
            parts.append(data[at:stop])
        at = stop
    bare = b"".join(parts)
    return bare if bare != data else None


def bare_jpeg(data: bytes) -> bytes | None:
    """A JPEG without profiles, text and what programs left; APP0 and APP14 say what the colours
    are, APP1 which way is up. None for other formats, and where nothing can be left out."""
    if not data.startswith(_JPEG):
        return None
    parts, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _SCAN:
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] not in _BESIDE:
            parts.append(data[at:stop])
        at = stop
    bare = b"".join([*parts, data[at:]])
    return bare if bare != data else None


def padded_jpegs(data: bytes) -> list[bytes]:
    """A JPEG with several patterns of bits behind it; none for other formats.

    Pillow looks at nothing behind the last pixel, but reads ahead. So if all of these show the same
    picture, no pixel is missing; if bits are missing, the patterns are taken for them. A
    progressive JPEG is not read without its end marker: whole scans of it may be missing.
    """
    if not data.startswith(_JPEG):
        return []
    pixels = data.removesuffix(b"\xff")  # the first half of its end marker
    patterns = (bytes(n * factor % 251 for n in range(1, _PADDING + 1)) for factor in _FACTORS)
    return [pixels + pattern for pattern in patterns]
