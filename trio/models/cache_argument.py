"""How transformers calls the cache: `past_key_values`, from 5.24 on `cache`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import transformers
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
