"""Features of images that several engines on one model read one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch

from trio.families.adapter import Adapter, Features, Inputs, Join

_Key = tuple[int, str, int | None]
"""Of an image's inputs, the encoder's reduction, and what that leaves."""
_Encoded = tuple[Inputs, Features, float]
"""An image, which is held as its id must stay its own; its features; the seconds they took."""


class SharedEncoder:
    """Takes the place of an adapter's `encode_images` and remembers what that gave.

    An image is known by its mapping of inputs, so that requests have to share that object; it is
    held until `release`.

    `join`: for a method that compares images with texts, if one of the engines has such; the others
    then have its cost in their encoding too, a thousandth of the tower's.
    """

    def __init__(self, adapter: Adapter, join: Join | None = None) -> None:
        self._adapter = adapter
        self.join = join
        self._found: dict[int, dict[_Key, _Encoded]] = {}
        """By image."""
        self.images = 0
        """That the encoder has read."""
        self.saved_s = 0.0
        """Seconds that reading them again would have taken."""

    def __call__(
        self,
        inputs: Sequence[Inputs],
        encoder: str = "none",
        keeps: Sequence[int] = (),
        join: Join | None = None,
    ) -> list[Features]:
        wanted: Sequence[int | None] = keeps if encoder != "none" else [None] * len(inputs)
        keys = [(id(image), encoder, keep) for image, keep in zip(inputs, wanted, strict=True)]
        new = {
            key: image
            for key, image in zip(keys, inputs, strict=True)
            if key not in self._found.get(key[0], ())
        }
        self._encode(new)
        found = [self._found[key[0]][key] for key in keys]
        self.saved_s += sum(
            seconds for key, (*_, seconds) in zip(keys, found, strict=True) if key not in new
        )
        return [features for _, features, _ in found]

    def release(self, inputs: Iterable[Inputs]) -> None:
        """No engine reads these images again."""
        for image in inputs:
            self._found.pop(id(image), None)

    def forget(self) -> None:
        """Drop all features."""
        self._found.clear()

    def _encode(self, new: dict[_Key, Inputs]) -> None:
        if not new:
            return
        (_, encoder, _), *_ = new
        began = self._now()
        keeps = [keep or 0 for _, _, keep in new]
        found = self._adapter.encode_images(list(new.values()), encoder, keeps, self.join)
        seconds = (self._now() - began) / len(new)
        for (key, image), features in zip(new.items(), found, strict=True):
            self._found.setdefault(key[0], {})[key] = image, features, seconds
        self.images += len(new)

    def _now(self) -> float:
        """Seconds by a clock that has waited for the device."""
        device = self._adapter.decoder.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
