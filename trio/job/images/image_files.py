"""From what an ``image`` cell holds to RGB images, or to an error that belongs to its row.

INPUT bytes, a struct of ``bytes`` and ``path``, a path or URI, base64 or a ``data:`` URL, or a
list of these; OUTPUT a list of PIL images in RGB, upright, first frame, transparency over white,
each with ``NOTE`` in its ``info`` where its file had to be mended. Thread-safe, no torch.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image, UnidentifiedImageError, features

from trio.job.images import formats, inline, mend
from trio.job.images.fetch import fetch, is_remote
from trio.job.images.policy import ImagePolicy, RowError

if TYPE_CHECKING:
    from trio.job.storage import Location

Image.init()
_WANTED = {
    "JPEG": "JPEG image",
    "MPO": "JPEG image",
    "PNG": "PNG image",
    "WEBP": "WebP image",
    "AVIF": "AVIF image",
    "GIF": "GIF image",
    "BMP": "BMP image",
    "DIB": "BMP image",
    "TIFF": "TIFF image",
    "PPM": "PPM image",
    "JPEG2000": "JPEG 2000 image",
    "ICO": "ICO image",
}
# an allow-list, with what messages call each: some of Pillow's other readers start programs (EPS)
# or are little tested
_CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
# that a Pillow may lack, though it knows the format
FORMATS = tuple(
    name
    for name in _WANTED
    if name in Image.OPEN and (name not in _CODECS or features.check(_CODECS[name]))
)
MAX_ASPECT = 200
# resizing the short side of a thinner image to a model's input makes a huge one
MAX_NAME = 4096
# characters of a path or URI
LONG_NAME = 255
# of a file: what is longer and in base64's alphabet is hardly meant as one
NOTE = "note"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# what undoes each orientation of EXIF
_ORIENTATION = 274
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


def note_of(images: Sequence[Image.Image]) -> str | None:
    """What had to be mended in a row's images, for the row; None where nothing had."""
    several = len(images) > 1
    notes = [
        f"image {number} of {len(images)}: {image.info[NOTE]}" if several else image.info[NOTE]
        for number, image in enumerate(images, 1)
        if image.info.get(NOTE)
    ]
    return "; ".join(notes) or None


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
            return _text_in_bytes(data)
        item = data if data is not None or path is None else path
    if item is None:
        raise RowError("image_missing", "the row has no image")
    if not isinstance(item, bytes | bytearray | memoryview | str):
        raise RowError("image_unreadable", f"expected bytes or a path, got {type(item).__name__}")
    return item


def _text_in_bytes(text: str) -> bytes:
    """Text where bytes should be: base64 or nothing, never a path."""
    data = text.encode("utf-8", "replace")
    if text and not inline.is_text_of_image(data):
        raise RowError(
            "image_unreadable",
            "expected bytes in the field 'bytes', got text that is not base64 of an image",
        )
    return data


def _data(part: Part, base: str | None, policy: ImagePolicy) -> Buffer:
    """Encoded bytes of one image, wherever they are."""
    data = _from_text(part, base, policy) if isinstance(part, str) else _from_bytes(part, policy)
    if len(data) == 0:
        raise RowError("image_empty", "the image has zero bytes")
    if len(data) > policy.max_bytes:
        raise RowError("image_oversized", f"{len(data)} bytes, more than {policy.max_bytes}")
    return data


def _from_text(text: str, base: str | None, policy: ImagePolicy) -> Buffer:
    """What text names, or stands for; a file of that name comes first where there can be one."""
    data = text.encode("utf-8", "replace")
    if inline.is_text_of_image(data):
        local = len(text) <= MAX_NAME and not is_remote(base) and not inline.is_certain(data)
        with suppress(RowError):
            if local:
                return fetch(text, base, policy)
        return _inline(data, policy)
    neither = f"text of {len(text)} characters is neither a path or URI nor base64 of an image"
    if len(text) > MAX_NAME:
        raise RowError("image_unreadable", neither)
    try:
        return fetch(text, base, policy)
    except RowError as error:
        if inline.is_no_name(data) or (len(text) > LONG_NAME and inline.is_digits(data)):
            raise RowError(error.kind, neither) from error
        raise


def _from_bytes(data: Buffer, policy: ImagePolicy) -> Buffer:
    """Encoded bytes as they are, or what they say in base64."""
    if formats.name_of(data) is None and inline.is_text_of_image(bytes(data[: inline.HEAD])):
        return _inline(bytes(data), policy)
    return data


def _inline(text: bytes, policy: ImagePolicy) -> bytes:
    if len(text) > 4 * policy.max_bytes:  # each byte in at most three characters, but for spaces
        raise RowError("image_oversized", f"{len(text)} characters of base64 or a data: URL")
    return inline.decoded(text)


def decode(data: Buffer, policy: ImagePolicy) -> Image.Image:
    """Encoded bytes as an upright RGB image; the size is checked before any pixel is decoded.

    Raises:
        RowError: no image, damaged, or beyond a limit.
    """
    try:
        image, note = _read(data, policy), mend.unfinished(data)
    except RowError as error:
        if error.kind not in ("image_unreadable", "image_truncated"):
            raise
        image, note = _mended(data, policy, error)
    image.info = {NOTE: note} if note else {}
    return image


def _mended(data: Buffer, policy: ImagePolicy, error: RowError) -> tuple[Image.Image, str]:
    """A damaged image whose pixels are all there, and what was the matter.

    Raises:
        RowError: pixels are damaged too; the given one where nothing else is.
    """
    with suppress(RowError):
        if image := _same(mend.ended(data), policy):
            return image, mend.NO_END
    for orientation in (True, False):
        bare = mend.bare(data, orientation=orientation)
        if bare is None:
            continue
        try:
            return _read(bare, policy), mend.BARE
        except RowError as without:
            error = without
        with suppress(RowError):
            if image := _same(mend.ended(bare), policy):
                return image, f"{mend.NO_END}; {mend.BARE}"
    raise error


def _same(variants: Sequence[Buffer], policy: ImagePolicy) -> Image.Image | None:
    """The image that all variants show; None where they differ or there are none."""
    if not variants:
        return None
    image = _read(variants[0], policy)
    pixels = image.tobytes()
    same = all(_read(other, policy).tobytes() == pixels for other in variants[1:])
    return image if same else None


def _read(data: Buffer, policy: ImagePolicy) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise RowError("image_unreadable", _unidentified(data)) from error
    except Image.DecompressionBombError as error:
        raise RowError("image_oversized", "far more pixels than any limit") from error
    except Exception as error:  # Pillow's readers raise whatever a broken header leads them to
        name = formats.name_of(data) or "unknown format"
        raise RowError("image_unreadable", f"{name}: {_reason(error)}") from error
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


def _unidentified(data: Buffer) -> str:
    """Why bytes that no reader takes are no image for us, by what they begin with."""
    name = formats.name_of(data)
    if name is None:
        return "no known image format"
    mine = [each for each, called in _WANTED.items() if called == name]
    if not mine:
        return formats.advice(name)
    if not set(mine) & set(FORMATS):
        return f"{name}: Pillow is installed without it; convert it to JPEG or PNG"
    return f"{name} with a damaged header"


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return image
    return image if turn is None else image.transpose(turn)


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
