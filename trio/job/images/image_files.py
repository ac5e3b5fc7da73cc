"""From what an ``image`` cell holds to RGB images, or to an error that belongs to its row.

INPUT bytes, a struct of ``bytes`` and ``path``, a path or URI, base64 or a ``data:`` URL, or a
list of these; OUTPUT a list of PIL images in RGB, upright, first frame, transparency over white,
each with ``NOTE`` in its ``info`` where its file had to be mended. Thread-safe, no torch.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from trio.errors import kind_and_line
from trio.job.images import formats, inline, mend
from trio.job.images.fetch import fetch
from trio.job.images.policy import ImagePolicy, RowError
from trio.job.storage import Location

Image.init()
_READERS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM")
FORMATS = tuple(name for name in (*_READERS, "JPEG2000", "ICO") if name in Image.OPEN)
# an allow-list: some of Pillow's other readers start programs (EPS) or are little tested
MAX_ASPECT = 200
# resizing the short side of a thinner image to a model's input makes a huge one
MAX_NAME = 4096
# characters of a path or URI
NOTE = "note"
Buffer = bytes | bytearray | memoryview


def load_images(value: Any, base: Location | None, policy: ImagePolicy) -> list[Image.Image]:
    """Images of one cell; ``base`` is the directory of the row's shard.

    Raises:
        RowError: anything that keeps an image from being shown to the model.
    """
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise RowError("image_missing", "the row has no image")
    images = []
    for number, item in enumerate(items, 1):
        where = f"image {number} of {len(items)}: " if len(items) > 1 else ""
        try:
            image = decode(_data(item, base, policy), policy)
        except RowError as error:
            raise RowError(error.kind, where + error.message) from error
        if NOTE in image.info:
            image.info[NOTE] = where + image.info[NOTE]
        images.append(image)
    return images


def note_of(images: Sequence[Image.Image]) -> str | None:
    """What had to be mended in a row's images, for the row; None where nothing had."""
    return "; ".join(image.info[NOTE] for image in images if NOTE in image.info) or None


def _data(item: Any, base: Location | None, policy: ImagePolicy) -> bytes:
    """Encoded bytes of one image, wherever they are."""
    if isinstance(item, Mapping):
        data = item.get("bytes")
        if isinstance(data, str):  # base64 or nothing, never a path
            data = data.encode()
        item = item.get("path") if data is None else data
    if item is None:
        raise RowError("image_missing", "the row has no image")
    if isinstance(item, str):
        data = _from_text(item, base, policy)
    elif isinstance(item, Buffer):
        data = bytes(item)
        if formats.name_of(data) is None and inline.stands_for_image(data):
            data = inline.decoded(data)
    else:
        raise RowError("image_unreadable", f"expected bytes or a path, got {type(item).__name__}")
    if not data:
        raise RowError("image_empty", "the image has zero bytes")
    if len(data) > policy.max_bytes:
        raise RowError("image_oversized", f"{len(data)} bytes, more than {policy.max_bytes}")
    return data


def _from_text(text: str, base: Location | None, policy: ImagePolicy) -> bytes:
    """What text names, or stands for; a local file of that name comes first."""
    data, short = text.encode("utf-8", "replace"), len(text) <= MAX_NAME
    if inline.stands_for_image(data):
        with suppress(RowError):
            if short and (base is None or base.local):
                return fetch(text, base, policy)
        return inline.decoded(data)
    if short:
        return fetch(text, base, policy)
    raise RowError(
        "image_unreadable",
        f"text of {len(text)} characters is neither a path or URI nor base64 of an image",
    )


def decode(data: bytes, policy: ImagePolicy) -> Image.Image:
    """Encoded bytes as an upright RGB image; the size is checked before any pixel is decoded.

    Raises:
        RowError: no image, damaged, or beyond a limit.
    """
    try:
        image, note = _read(data, policy), mend.NO_END if mend.unfinished(data) else None
    except RowError as error:
        if error.kind not in ("image_unreadable", "image_truncated"):
            raise
        image, note = _mended(data, policy, error)
    image.info = {NOTE: note} if note else {}
    return image


def _mended(data: bytes, policy: ImagePolicy, error: RowError) -> tuple[Image.Image, str]:
    """A damaged image whose pixels are all there, and what was the matter.

    Raises:
        RowError: pixels are damaged too; the given one where nothing else is.
    """
    if whole := _same(mend.padded_jpegs(data), policy):
        return whole, mend.NO_END
    bare = mend.bare_png(data) or mend.bare_jpeg(data)
    if bare is None:
        raise error
    if not mend.unfinished(bare):
        return _read(bare, policy), mend.BARE
    if whole := _same(mend.padded_jpegs(bare), policy):
        return whole, f"{mend.NO_END}; {mend.BARE}"
    raise error


def _same(variants: Sequence[bytes], policy: ImagePolicy) -> Image.Image | None:
    """The image that all variants show; None where they differ, or there are none."""
    image = None
    for variant in variants:
        try:
            other = _read(variant, policy)
        except RowError:
            return None
        if image and image.tobytes() != other.tobytes():
            return None
        image = other
    return image


def _read(data: bytes, policy: ImagePolicy) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise RowError("image_unreadable", _unidentified(data)) from error
    except Image.DecompressionBombError as error:
        raise RowError("image_oversized", "far more pixels than any limit") from error
    except Exception as error:  # Pillow's readers raise whatever a broken header leads them to
        name = formats.name_of(data) or "unknown format"
        raise RowError("image_unreadable", f"{name}: {kind_and_line(error)}") from error
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
        with suppress(Exception):  # broken EXIF says nothing about the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # a body may be broken in as many ways as a header
        reason = kind_and_line(error)
        kind = "image_truncated" if "truncated" in reason.lower() else "image_unreadable"
        raise RowError(kind, reason) from error


def _unidentified(data: bytes) -> str:
    """Why bytes that no reader takes are no image for us, by what they begin with."""
    name = formats.name_of(data)
    if name is None:
        return "no known image format"
    if name in formats.TAKEN:
        return f"{name} with a damaged header, or of a kind that this Pillow does not read"
    return f"{name}: not supported; give JPEG or PNG, of a video single frames"


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
    import numpy as np  # needed by few images

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
