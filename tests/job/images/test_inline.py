"""Images that stand in a cell as text, and text that does not."""

import base64
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import pytest
from PIL import Image

from tests.job.fakes import encoded, png
from trio.job.images import inline
from trio.job.images.image_files import load_images
from trio.job.images.policy import ImagePolicy, RowError
from trio.job.storage import locate

POLICY = ImagePolicy()
RED = (200, 10, 10)
DATA = png(RED)
TEXT = base64.b64encode(DATA).decode()
NOISE = Image.effect_noise((64, 48), 90).convert("RGB")


def lines(text: str) -> str:
    return "".join(text[n : n + 19] + "\r\n" for n in range(0, len(text), 19))


def failure(value: Any, policy: ImagePolicy = POLICY, base: str | None = None) -> RowError:
    with pytest.raises(RowError) as caught:
        load_images(value, locate(base) if base else None, policy)
    return caught.value


@pytest.mark.parametrize(
    "cell",
    [
        TEXT,
        f"\n  {lines(TEXT)}",
        TEXT.rstrip("="),
        base64.urlsafe_b64encode(DATA).decode(),
        f"data:image/png;base64,{TEXT}",
        f" DATA:image/PNG;charset=utf-8;BASE64,{lines(TEXT)}",
        f"data:;base64,{TEXT.rstrip('=')}",
        "data:image/png;base64," + TEXT.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        f"data:image/png,{quote_from_bytes(DATA)}",
        f"data:,{quote_from_bytes(DATA)}",
        f'"{TEXT}"',
        f" '{lines(TEXT)}' ",
        str(TEXT.encode()),
        f'"data:image/png;base64,{TEXT}"',
        f"b'{TEXT}'".encode(),
        {"bytes": f'"{TEXT}"', "path": None},
        TEXT.encode(),
        memoryview(lines(TEXT).encode()),
        f"data:image/png;base64,{TEXT}".encode(),
        {"bytes": TEXT, "path": None},
        {"bytes": f"data:image/png;base64,{TEXT}", "path": "gone.png"},
        {"bytes": None, "path": f"data:image/png;base64,{TEXT}"},
        [TEXT, DATA],
    ],
)
def test_text_that_is_an_image(cell: Any, tmp_path: Path) -> None:
    for base in (None, locate(str(tmp_path)), locate("s3://bucket/of/shards?region=us-east-1")):
        for image in load_images(cell, base, POLICY):
            assert image.size == (12, 9) and image.getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_base64_of_every_format(kind: str) -> None:
    for size in ((64, 48), (3, 2)):
        text = base64.b64encode(encoded(NOISE.resize(size), kind)).decode()
        for cell in (text, text.encode(), {"bytes": text}):
            assert load_images(cell, None, POLICY)[0].size == size


def test_every_byte_survives_both_alphabets() -> None:
    photo = encoded(NOISE, "JPEG", quality=97)
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        assert inline.decoded(encode(photo)) == photo


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (f"data:image/png;base64,{TEXT[:40]}@@@{TEXT[40:]}", "base64 text that cannot"),
        (f"data:image/png;base64,{TEXT[:-3]}", "base64 text that cannot be decoded"),
        ("data:image/png;base64,", "zero bytes"),
        ("data:text/plain;base64,aGVsbG8gd29ybGQ=", "no known image format"),
        ("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E", "SVG drawing: not"),
        (TEXT[:60] + "\0" + TEXT[60:], "base64 text that cannot"),
        (TEXT[:50] + "=" + TEXT[50:], "base64 text that cannot"),
        ("iVBORw0KGgoAAAANSUhEUgAAAAwAAAAJ-is not there.png", "base64 text that cannot"),
        ("A" * 5000, "text of 5000 characters is neither a path or URI nor base64"),
        ({"bytes": "img/a.png", "path": None}, "no known image format"),
        ({"bytes": TEXT[:-3], "path": None}, "base64 text that cannot be decoded"),
    ],
)
def test_damaged_text_is_named_and_not_printed(cell: Any, said: str) -> None:
    error = failure(cell)
    assert said in error.message and len(error.message) < 120 and TEXT[:30] not in str(error)


def test_large_text_is_refused_before_it_is_decoded() -> None:
    for cell in (TEXT, f"data:image/png;base64,{TEXT}", {"bytes": TEXT}):
        for most in (10, len(DATA) - 1):
            assert failure(cell, ImagePolicy(max_bytes=most)).kind == "image_oversized"
        assert load_images(cell, None, ImagePolicy(max_bytes=len(DATA)))


def test_files_whose_names_look_like_base64(tmp_path: Path) -> None:
    """A file that is there is meant, also by the field `path` of a struct."""
    names = [TEXT[:40].replace("/", "_"), "iVBORw0KGgo", "data:a,b.png", "work/R0lGODlhAQ", "b2s="]
    (tmp_path / "work").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(png((1, 2, 3)))
        for cell in (name, {"bytes": None, "path": name}, {"path": f"./{name}"}):
            image = load_images(cell, locate(str(tmp_path)), POLICY)[0]
            assert image.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    "name",
    [
        "/data/images/00/0000017/photo_of_a_cat_in_the_garden",
        "/data/images/of/the/second/year/0000/0017/photo_of_a_cat_in_the_garden",
        "a caption of a cat that sits in the garden where an image should be named",
        "'photo.png'",
        "0" * 64,
        "Qk0/" * 12,
        "9j/4AAQ",
        "P5",
    ],
)
def test_paths_are_no_base64(name: str, tmp_path: Path) -> None:
    error = failure(name, base=str(tmp_path))
    assert error.kind in ("image_not_found", "image_forbidden") and "base64 " not in str(error)
    assert name in str(error)


def test_long_names_are_shortened() -> None:
    assert len(str(RowError("kind", "x" * 100_000))) < 1100
