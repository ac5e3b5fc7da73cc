"""Features of images that are read more than once: by other prompts, or by other engines."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from trio.decoder.stopwatch import Stopwatch
from trio.engine.request import ImageInputs
from trio.families.adapter import Adapter, Features, Inputs, Join

CACHE_BYTES = 256 << 20
"""Of features that nobody is known to read again."""
_Name = Hashable
"""Of an image."""
_Key = tuple[_Name, str, int | None]
"""Of an image, the encoder's reduction, and what that leaves."""


@dataclass(slots=True)
class _Encoded:
    features: Features
    took: Stopwatch
    """Of the pass of the encoder that they come from."""
    images: int
    """In that pass."""
    readers: set[int] = field(default_factory=set)
    """Who has read them."""


@dataclass(slots=True)
class _Image:
    inputs: Inputs | None
    """Held where it has no digest: the object that it is stands for it."""
    encoded: dict[_Key, _Encoded] = field(default_factory=dict)


class SharedEncoder:
    """Takes the place of an adapter's `encode_images` and remembers what that gave.

    An image is known by the digest of its inputs (`ImageInputs`), other mappings by their identity.
    The features read last are kept within `cache_bytes`; with `hold` also all others until
    `release`.

    `join`: for a method that compares images with texts, if one of the engines has such; the others
    then have its cost in their encoding too, a thousandth of the tower's.
    """

    def __init__(
        self,
        adapter: Adapter,
        join: Join | None = None,
        *,
        hold: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._adapter = adapter
        self.join = join
        self._hold = hold
        self._cache_bytes = cache_bytes
        self._found: OrderedDict[_Name, _Image] = OrderedDict()
        """The one read last is the last."""
        self._held: set[_Name] = set()
        self._bytes = 0
        self._lock = threading.Lock()
        """`release` is called from other threads."""
        self.images = 0
        """That the encoder has read."""
        self.saved_s = 0.0
        """Seconds that readers were spared by others having read these images."""

    def __call__(
        self,
        inputs: Sequence[Inputs],
        encoder: str = "none",
        keeps: Sequence[int] = (),
        join: Join | None = None,
        *,
        reader: int = 0,
    ) -> list[Features]:
        """As `Adapter.encode_images`; `reader`: which engine asks."""
        with self._lock:
            return self._features(inputs, encoder, keeps, join, reader)

    def _features(
        self,
        inputs: Sequence[Inputs],
        encoder: str,
        keeps: Sequence[int],
        join: Join | None,
        reader: int,
    ) -> list[Features]:
        wanted: Sequence[int | None] = keeps if encoder != "none" else [None] * len(inputs)
        keys = [(_name(image), encoder, keep) for image, keep in zip(inputs, wanted, strict=True)]
        asked = dict(zip(keys, inputs, strict=True))
        self._encode({key: one for key, one in asked.items() if not self._has(key)}, join, reader)
        found = [self._read(key, reader) for key in keys]
        if self._hold:
            self._held.update(name for name, *_ in keys)
        self._trim()
        return found

    def release(self, inputs: Iterable[Inputs]) -> None:
        """Nobody is known to read these images again."""
        with self._lock:
            self._held.difference_update(map(_name, inputs))
            self._trim()

    def forget(self) -> None:
        """Drop all features."""
        with self._lock:
            self._found.clear()
            self._held.clear()
            self._bytes = 0

    def _has(self, key: _Key) -> bool:
        found = self._found.get(key[0])
        return found is not None and key in found.encoded

    def _encode(self, new: dict[_Key, Inputs], join: Join | None, reader: int) -> None:
        if not new:
            return
        (_, encoder, _), *_ = new
        took = Stopwatch(self._adapter.decoder.device)
        keeps = [keep or 0 for _, _, keep in new]
        joins = self.join or join
        with took.running():
            made = self._adapter.encode_images(list(new.values()), encoder, keeps, joins)
        for (key, image), features in zip(new.items(), made, strict=True):
            own = _alone(features)
            held = None if isinstance(image, ImageInputs) else image
            place = self._found.setdefault(key[0], _Image(held))
            place.encoded[key] = _Encoded(own, took, len(new), {reader})
            self._bytes += _size(own)
        self.images += len(new)

    def _read(self, key: _Key, reader: int) -> Features:
        self._found.move_to_end(key[0])
        found = self._found[key[0]].encoded[key]
        if reader not in found.readers:
            found.readers.add(reader)
            self.saved_s += found.took.seconds() / found.images
        return found.features

    def _trim(self) -> None:
        """Drops what was not read for longest, down to the bytes that may be kept."""
        if self._bytes <= self._cache_bytes:
            return
        for name in [name for name in self._found if name not in self._held]:
            if self._bytes <= self._cache_bytes:
                break
            gone = self._found.pop(name)
            self._bytes -= sum(_size(one.features) for one in gone.encoded.values())


def _name(image: Inputs) -> _Name:
    return image.digest if isinstance(image, ImageInputs) else id(image)


def _alone(features: Features) -> Features:
    """The same without what they are a part of, the features of a whole batch."""
    joint = features.joint
    return replace(
        features,
        tokens=_own(features.tokens),
        injected=tuple(map(_own, features.injected)),
        joint=joint and replace(joint, tokens=_own(joint.tokens)),
    )


def _own(x: Tensor) -> Tensor:
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def _size(features: Features) -> int:
    """Bytes on the device."""
    joint = () if features.joint is None else (features.joint.tokens,)
    return sum(x.nbytes for x in (features.tokens, *features.injected, *joint))
