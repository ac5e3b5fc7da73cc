"""From what an ``image`` cell holds to RGB images, or to an error that belongs to its row.

INPUT bytes, a struct of ``bytes`` and ``path``, a path or URI, or a list of these; OUTPUT a list of
PIL images in RGB, upright, first frame, transparency over white. Thread-safe, no torch.
"""

from __future__ import annotations

import io
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from trio.errors import UserError
from trio.pipeline.storage import Location, is_local, locate, scheme_of

Image.init()
_WANTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
# an allow-list: some of Pillow's other readers start programs (EPS) or are little tested
MAX_PIXELS = 90_000_000
MAX_BYTES = 256 << 20
MAX_ASPECT = 200
# resizing the short side of a thinner image to a model's input makes a huge one
FETCH_TIMEOUT_S = 30


class RowError(Exception):
    """A mistake in one input row: it becomes that row's ``error`` and touches no other."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePolicy:
    """What may be opened."""

    max_pixels: int = MAX_PIXELS
    # width times height
    max_bytes: int = MAX_BYTES
    # of the encoded image
    allow_remote: bool = False
    # fetch URIs found in rows; paths relative to a remote shard are always read


def load_images(value: Any, base: Location | None, policy: ImagePolicy) -> list[Image.Image]:
    """Images of one cell; ``base`` is the directory of the row's shard.

    Raises:
        RowError: anything that keeps an image from being shown to the model.
    """
    if value is None or (isinstance(value, list | tuple) and not value):
        raise RowError("image_missing", "the row has no image")
    items = value if isinstance(value, list | tuple) else [value]
    if len(items) == 1:
        return [decode(image_bytes(items[0], base, policy), policy)]
    images = []
    for number, item in enumerate(items):
        try:
            images.append(decode(image_bytes(item, base, policy), policy))
        except RowError as error:
            where = f"image {number + 1} of {len(items)}: {error.message}"
            raise RowError(error.kind, where) from error
    return images


def image_bytes(item: Any, base: Location | None, policy: ImagePolicy) -> bytes:
    """Encoded bytes of one image, wherever they are."""
    if isinstance(item, Mapping):
        data, path = item.get("bytes"), item.get("path")
        item = data if data or path is None else path
    if item is None:
        raise RowError("image_missing", "the row has no image")
    data = _fetch(item, base, policy) if isinstance(item, str) else item
    if not isinstance(data, bytes | bytearray | memoryview):
        raise RowError("image_unreadable", f"expected bytes or a path, got {type(data).__name__}")
    if len(data) == 0:
        raise RowError("image_empty", "the image has zero bytes")
    if len(data) > policy.max_bytes:
        raise RowError("image_oversized", f"{len(data)} bytes, more than {policy.max_bytes}")
    return bytes(data)


def _fetch(name: str, base: Location | None, policy: ImagePolicy) -> bytes:
    if not name.strip() or "\0" in name:
        raise RowError("image_missing", "the row's image path is empty or no path")
    scheme = scheme_of(name)
    if not is_local(name):
        if not policy.allow_remote:
            raise RowError(
                "image_remote", f"{scheme}:// is not fetched without --allow-remote-images"
            )
        return _fetch_web(name, policy) if scheme in ("http", "https") else _fetch_uri(name, policy)
    if scheme == "file" or os.path.isabs(name) or base is None:
        return _fetch_uri(name, policy)
    if not base.local and ".." in name.split("/"):
        raise RowError("image_not_found", f"{name} leaves the directory of its shard")
    return _read(base.join(name), name, policy)


def _fetch_uri(name: str, policy: ImagePolicy) -> bytes:
    try:
        location = locate(name)
    except UserError as error:
        raise RowError("image_not_found", str(error)) from error
    return _read(location, name, policy)


def _read(location: Location, name: str, policy: ImagePolicy) -> bytes:
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            size = stream.size()
            if size > policy.max_bytes:
                raise RowError("image_oversized", f"{name}: {size} bytes")
            return bytes(stream.read())
    except FileNotFoundError as error:
        raise RowError("image_not_found", f"{name}: no such file") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = type(error).__name__
        raise RowError("image_not_found", f"{name}: cannot be read ({reason})") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _fetch_web(url: str, policy: ImagePolicy) -> bytes:
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(url, timeout=FETCH_TIMEOUT_S) as response:
            data = response.read(policy.max_bytes + 1)
    except urllib.error.HTTPError as error:
        raise RowError("image_not_found", f"{url}: HTTP status {error.code}") from error
    except (OSError, ValueError) as error:
        raise RowError("image_not_found", f"{url}: {type(error).__name__}") from error
    return bytes(data)


def decode(data: bytes, policy: ImagePolicy) -> Image.Image:
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
