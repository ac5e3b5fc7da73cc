"""What kind of file some bytes are, by the signature that they begin with. No Pillow.

For messages, and to tell text that stands for an image from a path.
"""

from __future__ import annotations

ENOUGH = 4096
# bytes from the start in which every signature lies
_AT_START = (
    (b"\xff\xd8\xff", "JPEG image"),
    (b"\x89PNG\r\n\x1a\n", "PNG image"),
    (b"GIF87a", "GIF image"),
    (b"GIF89a", "GIF image"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "JPEG 2000 image"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL image"),
    (b"8BPS", "Photoshop image"),
    (b"gimp xcf", "GIMP image"),
    (b"icns", "ICNS image"),
    (b"qoif", "QOI image"),
    (b"DDS ", "DDS image"),
    (b"BPG\xfb", "BPG image"),
    (b"FLIF", "FLIF image"),
    (b"\x76\x2f\x31\x01", "OpenEXR image"),
    (b"#?RADIANCE", "Radiance HDR image"),
    (b"#?RGBE", "Radiance HDR image"),
    (b"SIMPLE  =", "FITS image"),
    (b"AT&TFORM", "DjVu document"),
    (b"FUJIFILMCCD-RAW", "camera raw image (RAF)"),
    (b"IIRO", "camera raw image (ORF)"),
    (b"IIU\x00", "camera raw image (RW2)"),
    (b"II\xbc\x01", "JPEG XR image"),
    (b"II*\x00", "TIFF image"),
    (b"MM\x00*", "TIFF image"),
    (b"II+\x00\x08\x00", "TIFF image"),
    (b"MM\x00+\x00\x08", "TIFF image"),
    (b"\xd7\xcd\xc6\x9a", "WMF drawing"),
    (b"%PDF-", "PDF document"),
    (b"%!PS", "PostScript document"),
    (b"\xc5\xd0\xd3\xc6", "PostScript document"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (b"\x00\x00\x01\xba", "MPEG video"),
    (b"\x00\x00\x01\xb3", "MPEG video"),
    (b"FLV\x01", "FLV video"),
    (b"0&\xb2u\x8ef\xcf\x11", "Windows Media video"),
    (b"OggS", "Ogg video or sound"),
    (b"\x93NUMPY", "NumPy array"),
    (b"PAR1", "Parquet file"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"7z\xbc\xaf", "7z archive"),
    (b"\x1f\x8b\x08", "gzip file"),
    (b"\x28\xb5\x2f\xfd", "Zstandard file"),
)
_SHORT = (
    (b"BM", "BMP image"),
    (b"\xff\x0a", "JPEG XL image"),
)
# too short to tell text that stands for them from a path
_RIFF = {b"WEBP": "WebP image", b"AVI ": "AVI video"}
_BRANDS = {
    b"avif": "AVIF image",
    b"avis": "AVIF image",
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC image"),
    b"mif1": "HEIF image",
    b"msf1": "HEIF image",
    b"crx ": "camera raw image (CR3)",
    b"qt  ": "QuickTime video",
}
_BITMAP_HEADERS = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
# of ISO media files; the first of a file's brands that stands here, in this order


def name_of(data: bytes | bytearray | memoryview, *, short: bool = True) -> str | None:
    """What a file is called in messages; None where it begins with no known signature.

    Args:
        data: the file, or at least its first ENOUGH bytes.
        short: whether signatures of two bytes count.
    """
    head = bytes(data[:ENOUGH])
    signatures = (*_AT_START, *_SHORT) if short else _AT_START
    for magic, name in signatures:
        if head.startswith(magic):
            return name
    return _bitmap(head) or _icon(head) or _media(head) or _netpbm(head) or _markup(head)


def _bitmap(head: bytes) -> str | None:
    """A BMP whose second header has one of the known sizes [bytes]; that tells it from a word."""
    size = int.from_bytes(head[14:18], "little")
    return "BMP image" if head[:2] == b"BM" and size in _BITMAP_HEADERS else None


def _icon(head: bytes) -> str | None:
    """An icon or cursor: count of pictures above 0, and a reserved byte."""
    kind = {b"\0\0\1\0": "ICO image", b"\0\0\2\0": "CUR image"}.get(head[:4])
    return kind if len(head) >= 22 and head[4:6] != b"\0\0" and head[9] == 0 else None


def _media(head: bytes) -> str | None:
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        size = int.from_bytes(head[:4], "big")
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, min(size, 256), 4))}
        return next((name for brand, name in _BRANDS.items() if brand in brands), "MP4 video")
    return "DICOM image" if head[128:132] == b"DICM" else None


def _netpbm(head: bytes) -> str | None:
    plain = head[:1] == b"P" and head[1:2] in b"1234567Ff" and head[2:3].isspace()
    return "PPM image" if plain and len(head) > 6 else None


def _markup(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text:
        return "SVG drawing"
    return "HTML page" if text.startswith((b"<!doctype html", b"<html")) else None


def advice(name: str) -> str:
    """How to mend what is not taken."""
    if "video" in name:
        return f"{name}: not supported; give single frames as JPEG or PNG"
    if "page" in name:
        return f"{name}: no image, perhaps what a server answered instead of one"
    if any(word in name for word in ("archive", "file", "array")):
        return f"{name}: no image; give the encoded image itself"
    return f"{name}: not supported; convert it to JPEG or PNG"
