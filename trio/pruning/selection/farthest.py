"""Fill-up: what is missing after the NMS, by saliency and by farthest-point sampling.

TRIO's published code takes the most salient of the suppressed tokens. A budget larger than the
number of different things in an image then goes to more of the same few. `mixed` fills up a quarter
so, and the rest by farthest-point sampling: each time the token farthest from all that is kept, by
the cosine of features plus a Gaussian of the distance in the picture.
"""

from __future__ import annotations

import numpy as np

SALIENT = {"mixed": 4, "reference": 1}
"""By rule: one of so many missing tokens is taken by saliency."""
# What lying at one place counts beside a cosine of 1, and the distance at which that falls to
# exp(-1/2), in edges of a square as large as the picture. Chosen on other scenes than those of the
# quality tables.
NEARNESS = 0.3
_REACH = 1 / 3
FALL = -1 / (2 * _REACH**2)


def nearness(place_C2: np.ndarray, place_V2: np.ndarray) -> np.ndarray:
    """What places `[..., C, 2]` and `[..., V, 2]` add to cosines, `[..., C, V]`."""
    down, right = (place_C2[..., :, None, axis] - place_V2[..., None, :, axis] for axis in (0, 1))
    down *= down
    right *= right
    down += right
    down *= FALL
    np.exp(down, out=down)
    down *= NEARNESS
    return down
