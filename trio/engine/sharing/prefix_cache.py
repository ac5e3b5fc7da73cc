"""What the first layers make of an image, kept for the other prompts on it."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from itertools import chain

import numpy as np

from trio.engine.request import ImageInputs, Prepared
from trio.engine.sequence import SequenceState
from trio.shared_prefix import PrefixStates, Sharing

PART = 16
"""One of so many parts of the memory for keys and values is for states of images."""
_LEAST = 256 << 20
"""Where there are fewer bytes none is set aside, and only prompts of one batch share."""


class PrefixCache:
    """States of the tokens up to the end of a prompt's last image, behind the first layers.

    They are kept where they are known to be asked for again: by another prompt of the batch, or by
    one that waits. The last image of a batch is kept too, since the prompts on one image mostly
    come one after the other. What was used last stays, within `budget`.

    depth: layers; 0 shares nothing. budget: bytes of what is kept. room: bytes that the prompts of
    one batch may leave for each other. token_bytes: of a token's states.
    """

    def __init__(self, depth: int, *, budget: int, room: int, token_bytes: int) -> None:
        self.depth = depth
        self.budget = budget
        self._room = room
        self._token_bytes = token_bytes
        self._found: OrderedDict[bytes, PrefixStates] = OrderedDict()
        """The one used last is the last."""
        self.image_layers = 0
        """Layers, counted for each image whose tokens went through them."""
        self.followers = 0
        """Prompts that were spared them."""
        self._used: dict[bytes, PrefixStates] = {}
        """By the batch that was planned last."""

    def plan(
        self,
        sequences: Sequence[SequenceState],
        lengths: Sequence[int],
        ends: Sequence[int],
        ahead: Collection[bytes | None],
    ) -> Sharing | None:
        """Who goes through the first layers, and who takes over what they made.

        Args:
            sequences: of the batch.
            lengths: tokens of each that enter the decoder.
            ends: where the last image of each ends among them.
            ahead: prefixes of prompts that wait.

        Returns:
            None where nothing is shared nor kept.
        """
        if not self.depth:
            return None
        keys = [
            one.prefix if end < length else None
            for one, length, end in zip(sequences, lengths, ends, strict=True)
        ]
        times = Counter(keys)
        last = next((key for key in reversed(keys) if key is not None), None)
        owners: list[int] = []
        followers: dict[int, PrefixStates] = {}
        kept: dict[int, PrefixStates] = {}
        used: dict[bytes, PrefixStates] = {}
        room = self._room
        for row, (key, end) in enumerate(zip(keys, ends, strict=True)):
            states = None if key is None else used.get(key) or self._found.get(key)
            if states is not None:
                followers[row] = states
            else:
                owners.append(row)
                again = times[key] > 1 or (self.budget and (key in ahead or key == last))
                if key is not None and again and end * self._token_bytes <= room:
                    states = kept[row] = PrefixStates(end)
                    room -= end * self._token_bytes
            if key is not None and states is not None:
                used[key] = states
        self.image_layers += self.depth * sum(len(sequences[row].spans) for row in owners)
        self.followers += len(followers)
        self._used = used
        self._trim(self.budget - self._room + room)
        if not followers and not kept:
            return None
        return Sharing(depth=self.depth, owners=tuple(owners), followers=followers, kept=kept)

    def done(self) -> None:
        """The batch that was planned has been read: what it used stays, within the budget."""
        for key, states in self._used.items():
            self._found[key] = states
            self._found.move_to_end(key)
        self._used = {}
        self._trim(self.budget)

    def _trim(self, budget: int) -> None:
        """What was not used for longest goes first."""
        held = sum(states.nbytes for states in self._found.values())
        while self._found and held > budget:
            _, gone = self._found.popitem(last=False)
            held -= gone.nbytes

    def forget(self) -> None:
        self._found.clear()
        self._used = {}


def part_for_images(kv_bytes: int) -> int:
    """Bytes for the states of images, of those for keys and values."""
    return kv_bytes // PART if kv_bytes >= _LEAST else 0


def prefix_of(prepared: Prepared, spans: Sequence[tuple[int, int]]) -> bytes | None:
    """The same for prompts that begin with the same tokens and images; None without an image, or
    where an image has no digest.

    spans: of the images' tokens.
    """
    images = [one for one in prepared.image_inputs if isinstance(one, ImageInputs)]
    if not spans or len(images) < len(prepared.image_inputs):
        return None
    tokens = np.asarray(prepared.input_ids[: spans[-1][1]], dtype=np.int64)
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=16)
    for edge in chain.from_iterable(spans):
        digest.update(edge.to_bytes(8, "little"))
    for image in images:
        digest.update(image.digest)
    return digest.digest()
