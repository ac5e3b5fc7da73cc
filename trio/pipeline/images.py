"""From what an ``image`` cell holds to RGB images, or to an error that belongs to its row.

INPUT bytes, a struct of ``bytes`` and ``path``, a path or URI, or a list of these; OUTPUT a list of
PIL images in RGB, upright, first frame, transparency over white. Thread-safe, no torch. A job does
this in processes of its own (``image_process``).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from trio.pipeline.fetch import fetch
from trio.pipeline.policy import ImagePolicy, RowError

if TYPE_CHECKING:
    from trio.pipeline.storage import Location

Image.init()
_WANTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
# an allow-list: some of Pillow's other readers start programs (EPS) or are little tested
MAX_ASPECT = 200
# resizing the short side of a thinner image to a model's input makes a huge one
T = TypeVar("T")
Buffer = bytes | bytearray | memoryview
Part = Buffer | str
# an encoded image, or the name of one


def load_images(value: Any, base: Location | None, policy: ImagePolicy) -> list[Image.Image]:
    """Images of one cell; ``base`` is the directory of the row's shard.

    Raises:
        RowError: anything that keeps an image from being shown to the model.
    """
    return images_of(parts_of(value), base.uri if base else None, policy)


def parts_of(value: Any) -> list[Part]:
    """What a cell names or holds, one part for each image, not yet looked into.

    Raises:
        RowError: no image, or something that can be none.
    """
    if value is None or (isinstance(value, list | tuple) and not value):
        raise RowError("image_missing", "the row has no image")
    items = value if isinstance(value, list | tuple) else [value]
    return [_numbered(_part, items, number) for number in range(len(items))]


def images_of(parts: Sequence[Part], base: str | None, policy: ImagePolicy) -> list[Image.Image]:
    """The images of a row's parts; ``base`` is the path or URI of its shard's directory.

    Raises:
        RowError: an image that cannot be had.
    """

    def image(part: Part) -> Image.Image:
        return decode(_data(part, base, policy), policy)

    return [_numbered(image, parts, number) for number in range(len(parts))]


def _numbered(make: Callable[[Any], T], items: Sequence[Any], number: int) -> T:
    """What is made of one of several items; an error says of which."""
    try:
        return make(items[number])
    except RowError as error:
        if len(items) == 1:
            raise
        where = f"image {number + 1} of {len(items)}: {error.message}"
        raise RowError(error.kind, where) from error


def _part(item: Any) -> Part:
    if isinstance(item, Mapping):
        data, path = item.get("bytes"), item.get("path")
        if isinstance(data, str):
            raise RowError("image_unreadable", "expected bytes in the field 'bytes', got text")
        item = data if data is not None or path is None else path
    if item is None:
        raise RowError("image_missing", "the row has no image")
    if not isinstance(item, bytes | bytearray | memoryview | str):
        raise RowError("image_unreadable", f"expected bytes or a path, got {type(item).__name__}")
    return item


def _data(part: Part, base: str | None, policy: ImagePolicy) -> Buffer:
    """Encoded bytes of one image, wherever they are."""
    data = fetch(part, base, policy) if isinstance(part, str) else part
    if len(data) == 0:
        raise RowError("image_empty", "the image has zero bytes")
    if len(data) > policy.max_bytes:
        raise RowError("image_oversized", f"{len(data)} bytes, more than {policy.max_bytes}")
    return data


def decode(data: Buffer, policy: ImagePolicy) -> Image.Image:
    """Encoded bytes as an upright RGB image; the size is checked before any pixel is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise RowError("image_unreadable", "no known image format") from error
    except Image.DecompressionBombError as error:
        raise RowError("image_oversized", "far more pixels than any limit") from error
    except Exception as error:  # Pillow's readers raise whatever a broken header leads them to
        raise RowError("image_unreadable", _reason(error)) from error
    width, height = image.size
    if width * height > policy.max_pixels:
        raise RowError(
            "image_oversized", f"{width} x {height} pixels, more than {policy.max_pixels} in all"
        )
    if width < 1 or height < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise RowError("image_shape", f"{width} x {height} pixels: thinner than 1:{MAX_ASPECT}")
    try:
        image.seek(0)
        image.load()
        return to_rgb(_upright(image))
    except Exception as error:  # a body may be broken in as many ways as a header
        reason = _reason(error)
        if isinstance(error, MemoryError) or "out of memory" in reason:
            raise RowError(
                "image_oversized", "decoding takes more memory than the limit"
            ) from error
        kind = "image_truncated" if "truncated" in reason.lower() else "image_unreadable"
        raise RowError(kind, reason) from error


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF says nothing about the pixels
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: transparency over white, 16 bit scaled to 8, never wrapped."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep(image).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        front = image.convert("RGBA")
        white = Image.new("RGBA", front.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, front).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16 or 32 bit integers and floats as 8 bit grey.

    Integers up to 255 are taken as they are, larger ones as 16 bit; floats up to 1 as fractions.
    """
    import numpy as np  # a third of what a process for images would load

    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    if image.mode == "F":
        scale = 255.0 if top <= 1.0 else 1.0 if top <= 255.0 else 255.0 / top
    elif image.mode.startswith("I;16") or top > 255.0:
        scale = 255.0 / 65535.0 if top <= 65535.0 else 255.0 / top
    else:
        scale = 1.0
    return Image.fromarray(np.clip(values * scale, 0.0, 255.0).round().astype(np.uint8))
