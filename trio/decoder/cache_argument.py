"""The KV cache's argument name: `past_key_values`, from transformers 5.24 on `cache`.

Layers take what they do not know and say nothing. So a name that a version no longer knows would
give wrong answers, unless somebody counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from trio.errors import UserError

_NAMES = ("cache", "past_key_values")


def cache_keyword(function: Callable[..., Any]) -> str:
    """By which of its arguments a function of transformers takes the cache.

    Raises:
        UserError: by none of the known ones.
    """
    parameters = inspect.signature(function).parameters
    found = next((name for name in _NAMES if name in parameters), None)
    if found is None:
        where = getattr(function, "__qualname__", type(function).__name__)
        raise UserError(
            f"{where} takes its cache by none of the known names, {' or '.join(_NAMES)}, under "
            f"transformers {transformers.__version__}: install a version that the README names"
        )
    return found


CACHE = cache_keyword(BaseModelOutputWithPast)
"""The name that this version uses throughout."""


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache that a call brings, under whichever name; None if it brings none."""
    return next((call[name] for name in _NAMES if call.get(name) is not None), None)


class Once:
    """Hands cache and layout of a call on to its layers, and sees that each uses both once.

    Args:
        cache: where keys and values go; None stores nothing.
        layout: how the tokens belong together.
        keyword: of the cache in the layers' forward.
    """

    def __init__(self, cache: Any, layout: Any, keyword: str) -> None:
        self._cache, self._layout = cache, layout
        self._updates: list[int] = []
        self._attended = 0
        self.stores = cache is not None
        self._wanted = int(self.stores)
        self._keyword = keyword

    @property
    def arguments(self) -> dict[str, Any]:
        """Of each layer. Not held, as an object that holds itself keeps the cache in memory until
        the garbage collector comes."""
        return {self._keyword: self if self._wanted else None, "layout": self}

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._updates.append(layer_idx)
        stored: tuple[Tensor, Tensor] = self._cache.update(key, value, layer_idx, *args, **kwargs)
        return stored

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self._attended += 1
        attended: Tensor = self._layout.attend(query, key, value, scale)
        return attended

    def check(self, index: int, layer: nn.Module) -> None:
        """Look at what a layer has done.

        Raises:
            UserError: it has not stored its keys and values once, or not attended once.
        """
        if self._updates == [index] * self._wanted and self._attended == 1:
            self._updates.clear()
            self._attended = 0
            return
        raise UserError(
            f"under transformers {transformers.__version__} layer {index}, a "
            f"{type(layer).__name__}, has called update of its {self._keyword} for layers "
            f"{self._updates} instead of {[index] * self._wanted}, and attend of its layout "
            f"{self._attended} times instead of once, so answers would be wrong: install a version "
            "of transformers that the README names"
        )
