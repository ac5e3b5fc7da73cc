"""Registry of model families."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from trio.decoder.weights import check_weights
from trio.errors import UserError, explaining
from trio.families.adapter import Adapter

GROUP = "trio_vlm.adapters"
"""Entry points by which installed packages add families: `model_type = "module:AdapterClass"`."""
_BUILT_IN = {
    "llava": "trio.families.llava:LlavaAdapter",
    "llava_next": "trio.families.llava_next:LlavaNextAdapter",
    "llava_onevision": "trio.families.llava_onevision:LlavaOnevisionAdapter",
    "qwen2_5_vl": "trio.families.qwen2_5_vl:Qwen25VLAdapter",
    "qwen3_vl": "trio.families.qwen3_vl:Qwen3VLAdapter",
}
_registered: dict[str, type[Adapter]] = {}


def register(model_type: str, adapter: type[Adapter]) -> None:
    """Add a family of models to this process, or put another adapter in the place of one.

    A job's engines are processes of their own: there the job's flag --adapters does the same, and
    wherever a package is installed that has an entry point of the group `trio_vlm.adapters`.

    Args:
        model_type: what the models' config.json says.
        adapter: a subclass of `trio.Adapter` for such models.

    Raises:
        UserError: no such class.
    """
    _registered[model_type] = _checked(model_type, adapter, f"{adapter!r:.100}")


def register_named(model_type: str, name: str) -> None:
    """As `register`, with the adapter as `module:Class`.

    Raises:
        UserError: it cannot be loaded.
    """
    register(model_type, _load(EntryPoint(model_type, name, GROUP)))


def register_adapters(named: Iterable[str]) -> None:
    """As `register_named`, each as `model_type=module:Class`, as a job's --adapters has them."""
    for one in named:
        register_named(*one.split("=", 1))


def adapt(model: Any) -> Adapter:
    """The adapter for a model.

    Raises:
        UserError: the family is not supported, or the weights are quantised or on many devices.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise _unsupported(type(model).__name__)
    adapter = adapter_class(config)
    check_weights(model)
    return adapter(model)


def adapter_class(config: Any) -> type[Adapter]:
    """The adapter class for models with this config.

    Raises:
        UserError: the family is not supported, or an entry point for it cannot be loaded.
    """
    kind = config.model_type
    if kind in _registered:
        return _registered[kind]
    if kind not in _entries():
        raise _unsupported(f"type {kind!r}")
    return _load(_entries()[kind])


def supported() -> list[str]:
    """Model types that have an adapter."""
    return sorted({*_registered, *_entries()})


@functools.cache
def _entries() -> dict[str, EntryPoint]:
    """Those built in are replaced by `register` alone, and not because something is installed."""
    own = [EntryPoint(kind, value, GROUP) for kind, value in _BUILT_IN.items()]
    return {entry.name: entry for entry in [*entry_points(group=GROUP), *own]}


def _load(entry: EntryPoint) -> type[Adapter]:
    with explaining(f"the adapter for {entry.name!r}, {entry.value},", most=200):
        found = entry.load()
    return _checked(entry.name, found, entry.value)


def _checked(model_type: str, found: object, name: str) -> type[Adapter]:
    what = f"the adapter for {model_type!r}, {name},"
    if not (isinstance(found, type) and issubclass(found, Adapter)):
        raise UserError(f"{what} is no subclass of trio.Adapter")
    if inspect.isabstract(found):
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise UserError(f"{what} is not complete: it lacks {lacking}")
    return found


def _unsupported(what: str) -> UserError:
    return UserError(
        f"models of {what} are not supported; supported model types are {', '.join(supported())}; "
        'trio/families/README.md says under "Adding a family" how to add one'
    )
