"""Small JPEG files of a row's images, for `gallery/`: made where the images are decoded, as nothing
keeps these."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

EDGE = 320
"""Pixels of the longer edge at most; smaller images keep their size."""
QUALITY = 80
MOST_IMAGES = 4
"""Of a row."""


def thumbnails(images: Sequence[Image.Image]) -> list[bytes]:
    """JPEG files of the first `MOST_IMAGES`.

    images: in RGB, upright.
    """
    return [_jpeg(_reduced(image)) for image in images[:MOST_IMAGES]]


def _reduced(image: Image.Image) -> Image.Image:
    scale = EDGE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, comment=b"")
    return stream.getvalue()
