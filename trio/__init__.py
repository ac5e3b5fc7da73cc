"""trio-vlm: visual-token pruning for vision-language models, and batch jobs that use it.

`import trio` is cheap: torch, transformers and ray are loaded by the first use of a name that needs
them. A name that is not ours is looked up in the async library `trio`, if that is installed as well
(see `trio._beside`), so that its users in the same environment keep working.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from trio import _beside

if TYPE_CHECKING:
    from trio import viz as viz
    from trio.engine.engine import Engine
    from trio.engine.request import Constraint, Explanation, Request, Result, Sampling
    from trio.families.adapter import Adapter, Features
    from trio.families.registry import register
    from trio.patching import patch, unpatch
    from trio.pruning.method import Choice, Context, Method, OneByOne, Stage
    from trio.pruning.method_registry import method_names, register_method
    from trio.pruning.options import Pruning
    from trio.pruning.schedule import Schedule

__all__ = [
    "Adapter",
    "Choice",
    "Constraint",
    "Context",
    "Engine",
    "Explanation",
    "Features",
    "Method",
    "OneByOne",
    "Pruning",
    "Request",
    "Result",
    "Sampling",
    "Schedule",
    "Stage",
    "method_names",
    "patch",
    "register",
    "register_method",
    "unpatch",
]

_HOME = {
    "Adapter": "trio.families.adapter",
    "Choice": "trio.pruning.method",
    "Constraint": "trio.engine.request",
    "Context": "trio.pruning.method",
    "Engine": "trio.engine.engine",
    "Explanation": "trio.engine.request",
    "Features": "trio.families.adapter",
    "Method": "trio.pruning.method",
    "OneByOne": "trio.pruning.method",
    "Pruning": "trio.pruning.options",
    "Request": "trio.engine.request",
    "Result": "trio.engine.request",
    "Sampling": "trio.engine.request",
    "Schedule": "trio.pruning.schedule",
    "Stage": "trio.pruning.method",
    "method_names": "trio.pruning.method_registry",
    "patch": "trio.patching",
    "register": "trio.families.registry",
    "register_method": "trio.pruning.method_registry",
    "unpatch": "trio.patching",
}


def __getattr__(name: str) -> object:
    if name == "viz":  # a package of ours, which its import sets
        return import_module("trio.viz")
    home = _HOME.get(name)
    value = getattr(import_module(home), name) if home else _beside.attribute(name)
    if not name.startswith("_"):
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "viz", *_beside.names()})


_beside.install()
