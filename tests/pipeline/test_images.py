"""Image cells: every form in, RGB or an error of the row out."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.pipeline.fakes import encoded, png
from trio.pipeline.images import decode, load_images, to_rgb
from trio.pipeline.policy import ImagePolicy, RowError
from trio.pipeline.storage import locate

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
        images = load_images(form, base, POLICY)
        assert len(images) == (len(form) if isinstance(form, list) else 1)
        assert all(i.getpixel((0, 0)) == RED and i.size == (12, 9) for i in images), form


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


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
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


def test_limits_are_settings() -> None:
    assert failure(png(), ImagePolicy(max_pixels=100)).kind == "image_oversized"
    assert failure(png(), ImagePolicy(max_bytes=10)).kind == "image_oversized"
    assert load_images(png(), None, ImagePolicy(max_pixels=108))[0].size == (12, 9)


def test_one_of_several_images_is_named() -> None:
    error = failure([png(), b"junk", png()])
    assert error.kind == "image_unreadable" and error.message.startswith("image 2 of 3")


def test_one_pixel_is_an_image() -> None:
    assert decode(png(RED, (1, 1)), POLICY).size == (1, 1)
