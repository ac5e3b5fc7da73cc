"""A cache of image features: one vision pass for all settings and questions on an image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from trio.families.adapter import Adapter, Features, Inputs, Join

AT_A_TIME = 16
"""Images in one timed pass."""
BESIDE = 3
"""A pass without the encoder's reduction is timed beside each so-manieth with it."""


class EncodedOnce:
    """Takes the place of an adapter's `encode_images` and remembers what that gave.

    An image is known by its mapping of inputs, so that requests have to share that object; the
    caller keeps it alive. `forget` when no setting to come reads these features.

    `join`: for a method that compares images with texts, which is to be among the settings; all
    others then have its cost in their encoding too, a thousandth of the tower's.
    """

    def __init__(self, adapter: Adapter, join: Join | None = None) -> None:
        self._adapter = adapter
        self._join = join
        self._features: dict[tuple[int, str, int | None], Features] = {}

    def fill(
        self, inputs: Sequence[Inputs], encoder: str, keeps: Sequence[int]
    ) -> tuple[float, float]:
        """Encode images in passes of `AT_A_TIME`; arguments as of `encode_images`.

        Returns:
            Seconds per image, the median of all passes; and of them those of the encoder's
            reduction, the median difference to a pass without it right behind, in some passes.
        """
        seconds, reducing = [], []
        for number, start in enumerate(range(0, len(inputs), AT_A_TIME)):
            part = inputs[start : start + AT_A_TIME]
            began = self._now()
            self(part, encoder, keeps[start : start + AT_A_TIME])
            ended = self._now()
            seconds.append((ended - began) / len(part))
            if encoder != "none" and number % BESIDE == 0:
                self._adapter.encode_images(part)
                reducing.append(seconds[-1] - (self._now() - ended) / len(part))
        return statistics.median(seconds), max(0.0, statistics.median(reducing or [0.0]))

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
            key: (image, keep or 0)
            for key, image, keep in zip(keys, inputs, wanted, strict=True)
            if key not in self._features
        }
        if new:
            images, counts = zip(*new.values(), strict=True)
            found = self._adapter.encode_images(images, encoder, counts, self._join)
            self._features.update(zip(new, found, strict=True))
        return [self._features[key] for key in keys]

    def forget(self) -> None:
        """Drop all features."""
        self._features.clear()

    def _now(self) -> float:
        """Seconds by a clock that has waited for the device."""
        device = self._adapter.decoder.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
