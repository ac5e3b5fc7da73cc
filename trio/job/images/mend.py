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
_PADDING = 64
# bytes: more than a decoder reads ahead
_FACTORS = (0, 37, 101, 181)
# of the patterns of bits that stand in for what may be missing


def unfinished(data: bytes) -> bool:
    """Whether a PNG or JPEG has no end marker."""
    end = _PNG_END if data.startswith(_PNG) else _JPEG_END if data.startswith(_JPEG) else b""
    return end not in data


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
