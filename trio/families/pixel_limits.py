"""Limits on the size to which a processor resizes images, where it takes them at many sizes.

Such processors (Qwen's) count pixels after resizing. Nothing here loads a model.
"""

from __future__ import annotations

from typing import Any

from trio.errors import UserError

_KEYS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Of the processor's `size`: transformers keeps numbers of pixels under names of edges."""


def limit_images(processor: Any, *, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set the limits of a processor; None leaves the one that it has.

    Args:
        min_pixels: width times height to which smaller images are enlarged.
        max_pixels: width times height to which larger images are reduced.

    Raises:
        UserError: this processor has no such limits, or these contradict each other or its own.
    """
    asked = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not asked:
        return
    for name, value in asked.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{name} must be a whole number of pixels, at least 1, got {value!r}")
    if not _has_limits(processor):
        raise UserError(
            f"{' and '.join(asked)} cannot be set: this model's processor makes pictures or tiles "
            "of fixed size of images; leave it out"
        )
    images = processor.image_processor
    limits = {name: images.size[key] for name, key in _KEYS.items()} | asked
    if limits["min_pixels"] > limits["max_pixels"]:
        told = {
            n: f"{n} {v}" + ("" if n in asked else " of the processor itself")
            for n, v in limits.items()
        }
        raise UserError(
            f"{told['min_pixels']} is above {told['max_pixels']}; set both so that they agree"
        )
    if limits["max_pixels"] < _token_pixels(images):
        raise UserError(
            f"max_pixels {limits['max_pixels']} is less than one visual token's "
            f"{_token_pixels(images)} pixels"
        )
    images.size = type(images.size)(**{_KEYS[name]: value for name, value in limits.items()})


def most_visual_tokens(processor: Any) -> int | None:
    """Of an image within the processor's limits; None where it has none.

    An image many times as long as it is wide may get some more, as it keeps at least one row, and
    so may small ones where the smallest and the largest size are close: edges are rounded.
    """
    if not _has_limits(processor):
        return None
    images = processor.image_processor
    return images.size[_KEYS["max_pixels"]] // _token_pixels(images)


def _has_limits(processor: Any) -> bool:
    images: Any = getattr(processor, "image_processor", None)
    known = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
    return _KEYS.keys() <= known.keys() and all(key in images.size for key in _KEYS.values())


def _token_pixels(images: Any) -> int:
    return (images.patch_size * images.merge_size) ** 2
