"""What encoding images costs, by passes of some of them at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from trio.engine.sharing.shared_encoder import SharedEncoder
from trio.families.adapter import Inputs

AT_A_TIME = 16
"""Images in one timed pass."""
BESIDE = 3
"""A pass without the encoder's reduction is timed beside each so-manieth with it."""


class EncodedOnce(SharedEncoder):
    """One vision pass for all settings and questions on an image, timed.

    `forget` when no setting to come reads these features.
    """

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

    def _now(self) -> float:
        """Seconds by a clock that has waited for the device."""
        device = self._adapter.decoder.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
