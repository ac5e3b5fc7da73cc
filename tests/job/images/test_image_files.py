"""Image cells: every form in, RGB or an error of the row out."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.job.fakes import encoded, png
from trio.job.images import image_files
from trio.job.images.image_files import decode, load_images, to_rgb
from trio.job.images.policy import ImagePolicy, RowError
from trio.job.storage import locate

POLICY = ImagePolicy()
RED = (200, 10, 10)


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> Any:
    image = decode(data, POLICY)
    assert image.mode == "RGB"
    return image.getpixel(at)


def failure(value: Any, policy: ImagePolicy = POLICY, base: Path | None = None) -> RowError:
    with pytest.raises(RowError) as caught:
        load_images(value, locate(str(base)) if base else None, policy)
    return caught.value


def header_only_png(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_forms_of_a_cell(tmp_path: Path) -> None:
    data = png(RED)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(data)
    base = locate(str(tmp_path))
    forms = [
        data,
        memoryview(data),
        {"bytes": data, "path": None},
        {"bytes": data, "path": "no/such/file.png"},
        {"bytes": None, "path": "sub/a.png"},
        {"path": "sub/a.png"},
        "sub/a.png",
        str(tmp_path / "sub" / "a.png"),
        f"file://{tmp_path}/sub/a.png",
        [data],
        [{"bytes": data, "path": None}, "sub/a.png"],
    ]
    for form in forms:
        loaded = load_images(form, base, POLICY)
        assert len(loaded) == (len(form) if isinstance(form, list) else 1)
        assert all(i.getpixel((0, 0)) == RED and i.size == (12, 9) for i in loaded), form


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode(encoded(image, exif=exif), POLICY)
    assert upright.size == (4, 8)
    assert upright.getpixel((3, 0)) == (255, 255, 255)


def test_palette_with_transparency_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=0)
    assert pixel(data, (0, 0)) == (255, 255, 255) and pixel(data, (1, 0)) == (0, 0, 255)


def test_alpha_lies_on_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == (255, 255, 255)
    half = pixel(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128))))
    assert half[0] == 255 and 125 <= half[1] == half[2] <= 129
    assert pixel(encoded(Image.new("LA", (2, 2), (0, 0)))) == (255, 255, 255)


def test_cmyk() -> None:
    red = pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red[0] > 200 and red[1] < 40 and red[2] < 40


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (65535, 255), (32768, 128), (200, 1)])
def test_sixteen_bit_is_scaled(value: int, grey: int) -> None:
    image = Image.fromarray(np.full((2, 2), value, np.uint16))
    assert pixel(encoded(image)) == (grey, grey, grey)
    assert pixel(encoded(image, "TIFF")) == (grey, grey, grey)


def test_float_and_one_bit() -> None:
    half = Image.fromarray(np.full((2, 2), 0.5, np.float32))
    assert to_rgb(half).getpixel((0, 0)) == (128, 128, 128)
    assert pixel(encoded(Image.new("1", (2, 2), 1))) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:], duration=50)
    seen = pixel(stream.getvalue())
    assert seen[0] > 240 and seen[1] < 15 and seen[2] < 15


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "image_missing"),
        ([], "image_missing"),
        ([None], "image_missing"),
        ({"bytes": None, "path": None}, "image_missing"),
        ("", "image_missing"),
        (b"", "image_empty"),
        ({"bytes": b"", "path": None}, "image_empty"),
        (b"not an image", "image_unreadable"),
        (png()[:20], "image_unreadable"),
        (encoded(Image.effect_noise((60, 60), 90), "JPEG")[:700], "image_truncated"),
        (header_only_png(30_000, 30_000), "image_oversized"),
        (header_only_png(20_000, 5_000), "image_oversized"),
        (header_only_png(9_000, 1), "image_shape"),
        (header_only_png(40, 40), "image_truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_unreadable"),
        (17, "image_unreadable"),
        ("no/such.png", "image_not_found"),
        ("https://example.org/a.png", "image_remote"),
        ("s3://bucket/a.png", "image_remote"),
    ],
)
def test_errors_have_a_kind_and_a_message(value: Any, kind: str, tmp_path: Path) -> None:
    error = failure(value, base=tmp_path)
    assert error.kind == kind
    assert str(error).startswith(f"{kind}: ") and len(error.message) > 5


def box(*brands: bytes) -> bytes:
    """The beginning of an ISO media file."""
    body = b"ftyp" + brands[0] + bytes(4) + b"".join(brands)
    return struct.pack(">I", len(body) + 4) + body + bytes(99)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (box(b"heic", b"mif1"), "HEIC image: not supported; give JPEG or PNG"),
        (box(b"mif1", b"heic"), "HEIC image: not supported"),
        (box(b"mif1", b"miaf"), "HEIF image: not supported"),
        (box(b"mif1", b"avif"), "AVIF image with a damaged header"),
        (box(b"avif"), "AVIF image with a damaged header"),
        (
            box(b"isom", b"avc1"),
            "MP4 or QuickTime video: not supported; give JPEG or PNG, of a video",
        ),
        (box(b"qt  "), "MP4 or QuickTime video: not supported"),
        (box(b"crx "), "no known image format"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL image: not supported"),
        (b"\xff\x0a" + bytes(99), "JPEG XL image: not supported"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000 image: "),
        (b"\xef\xbb\xbf <?xml version='1.0'?>\n<!-- x --><SVG/>", "SVG drawing: not supported"),
        (b"<!DOCTYPE html><p>Not found", "HTML page: not supported"),
        (b"%PDF-1.7\n", "PDF document: not supported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript document: not supported"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI video: not supported"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP image"),
        (b"\x1aE\xdf\xa3" + bytes(99), "Matroska or WebM video: not supported"),
        (bytes(128) + b"DICM", "DICOM image: not supported"),
        (encoded(Image.new("RGB", (9, 9)), "PCX"), "no known image format"),
        (b"8BPS\0\1" + bytes(99), "Photoshop image: not supported"),
        (b"PK\3\4" + bytes(99), "ZIP archive: not supported"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip archive: not supported"),
        (b"\x93NUMPY\1\0", "no known image format"),
        (b"II*\0" + bytes(9), "TIFF image with a damaged header"),
        (b"BM" + bytes(12) + b"\x28" + bytes(15), "BMP image: "),
    ],
)
def test_formats_that_are_not_taken_are_named(data: bytes, said: str) -> None:
    for cell in (data, {"bytes": data, "path": "a.jpg"}):
        error = failure(cell)
        assert error.kind == "image_unreadable" and error.message.startswith(said)


@pytest.mark.parametrize("kind", image_files.FORMATS)
def test_formats_that_are_taken(kind: str) -> None:
    data = encoded(Image.new("RGB", (32, 32), RED), kind)
    assert np.abs(np.subtract(pixel(data, (9, 9)), RED)).max() <= 4
    assert load_images([data], None, POLICY)[0].size == (32, 32)


def test_a_format_that_pillow_may_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        image_files, "FORMATS", tuple(f for f in image_files.FORMATS if f != "AVIF")
    )
    error = failure(encoded(Image.new("RGB", (32, 32)), "AVIF"))
    assert error.message.startswith(
        "AVIF image with a damaged header, or of a kind that this Pillow"
    )


def test_limits_are_settings() -> None:
    assert failure(png(), ImagePolicy(max_pixels=100)).kind == "image_oversized"
    assert failure(png(), ImagePolicy(max_bytes=10)).kind == "image_oversized"
    assert load_images(png(), None, ImagePolicy(max_pixels=108))[0].size == (12, 9)


def test_one_of_several_images_is_named() -> None:
    error = failure([png(), b"junk", png()])
    assert error.kind == "image_unreadable" and error.message.startswith("image 2 of 3")


def test_one_pixel_is_an_image() -> None:
    assert decode(png(RED, (1, 1)), POLICY).size == (1, 1)
