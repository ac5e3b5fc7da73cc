"""Notices that an answer goes round in a loop: the same n-gram again and again at its end."""

from __future__ import annotations

import numpy as np

LONGEST = 64
"""Tokens of an n-gram."""
SHORTEST = 16
"""Tokens that a loop takes at the least: short n-grams are said a few times in good answers."""


class RepetitionWatch:
    """Watches the end of one answer.

    `times`: as often as an n-gram of 1 to `LONGEST` tokens has to stand there in a row.
    """

    def __init__(self, times: int) -> None:
        lengths = np.arange(1, LONGEST + 1)
        self._wanted = np.maximum((times - 1) * lengths, SHORTEST - lengths)
        self.restart()

    def restart(self) -> None:
        self._last = np.full(LONGEST, -1, np.int64)
        """Tokens, the newest first."""
        self._alike = np.zeros(LONGEST, np.int64)
        """For each n the tokens at the end that equal the one n before them."""

    def loops(self, token: int) -> bool:
        """Takes the next token; whether the answer now ends in a loop."""
        self._alike = (self._alike + 1) * (self._last == token)
        self._last[1:] = self._last[:-1]
        self._last[0] = token
        return bool((self._alike >= self._wanted).any())
