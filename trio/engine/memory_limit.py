"""Limits that give way when the device runs out of memory, and come back. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

PATIENCE = 64
"""Pieces of work that must go well before a limit that was cut is doubled."""
MOST_PATIENCE = 4096


@dataclass(slots=True)
class Limit:
    """A number that is lowered when memory runs out and doubled once work has gone well for long.

    Each cut doubles how long that is: a cut starts running requests over, and where memory stays
    short, trying again and again would leave none of them time to finish.
    """

    most: int
    """As it was set; it grows no further."""
    now: int = field(init=False)
    _patience: int = field(init=False, default_factory=lambda: PATIENCE)
    _next_patience: int = field(init=False, default_factory=lambda: PATIENCE)
    _went_well: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.now = self.most

    def cut(self, to: int) -> int:
        """Memory ran out; returns what it now is, at least 1 and never more than before."""
        self.now = max(1, min(to, self.now))
        self._went_well = 0
        self._patience = self._next_patience
        self._next_patience = min(2 * self._patience, MOST_PATIENCE)
        return self.now

    def went_well(self) -> int:
        """A piece of work within the limit fitted; returns what the limit now is."""
        if self.now < self.most:
            self._went_well += 1
            if self._went_well >= self._patience:
                self.now, self._went_well = min(self.most, 2 * self.now), 0
        return self.now
