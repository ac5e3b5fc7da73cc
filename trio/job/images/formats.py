"""What kind of file some bytes are, by the signature that they begin with. No Pillow.

For messages, and to tell text that stands for an image from a path.
"""

from __future__ import annotations

import re

HEAD = 4096
# bytes in which every signature lies
_BRAND = rb".{4}ftyp(?:.{4}){0,30}?"
# of an ISO media file: the first one that is looked for

TAKEN = {
    "JPEG image": rb"\xff\xd8\xff",
    "PNG image": rb"\x89PNG\r\n\x1a\n",
    "GIF image": rb"GIF8[79]a",
    "WebP image": rb"RIFF.{4}WEBP",
    "AVIF image": _BRAND + rb"avi[fs]",
    "TIFF image": rb"II[*+]\0|MM\0[*+]",
    "BMP image": rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0{3}",
    "PPM image": rb"P[1-7Ff]\s",
    "JPEG 2000 image": rb"\0{3}\x0cjP  |\xff\x4f\xff\x51",
    "ICO image": rb"\0\0\x01\0(?!\0\0).{5}\0",
}
"""Formats that are read, by what messages call them: their signatures."""
_OTHERS = {
    "HEIC image": _BRAND + rb"(?:hei[cmsx]|hev[cx])",
    "HEIF image": _BRAND + rb"m[is]f1",
    "JPEG XL image": rb"\0{3}\x0cJXL |\xff\x0a",
    "Photoshop image": rb"8BPS",
    "DICOM image": rb".{128}DICM",
    "SVG drawing": rb"(?:\xef\xbb\xbf)?\s*(?i:(?:<\?xml|<!--|<!doctype svg).*<svg|<svg)",
    "HTML page": rb"(?:\xef\xbb\xbf)?\s*<(?i:!doctype html|html)",
    "PDF document": rb"%PDF-",
    "PostScript document": rb"%!PS",
    "MP4 or QuickTime video": rb".{4}ftyp(?:iso|mp4|avc1|M4V|qt|3g)",
    "AVI video": rb"RIFF.{4}AVI ",
    "Matroska or WebM video": rb"\x1aE\xdf\xa3",
    "ZIP archive": rb"PK\x03\x04",
    "gzip archive": rb"\x1f\x8b\x08",
}
_ALL = {name: re.compile(mark, re.DOTALL) for name, mark in (TAKEN | _OTHERS).items()}


def name_of(data: bytes | bytearray | memoryview) -> str | None:
    """What a file is called in messages; None where it begins with no known signature."""
    head = bytes(data[:HEAD])
    return next((name for name, signature in _ALL.items() if signature.match(head)), None)
