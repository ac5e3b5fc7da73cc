"""Lets the async library `trio` work inside our package of the same name.

Python knows one module per name, so where both are installed `trio` is ours and its users find it
through us: `trio.run`, `from trio.lowlevel import ...`, `import trio.testing`. Nothing of it is
loaded, or even looked for, before one of its names is used.

How: the library's `__init__.py` runs in a module of ours, NAMESPACE, under the name `trio`, so that
its relative imports and pickles are what they always were; its submodules become `trio.<name>` by a
finder at the end of sys.meta_path, which is asked only for what our package does not have.
"""

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from threading import get_ident
from types import CodeType, ModuleType
from typing import Any

NAMESPACE = "trio._async_library"


def locate() -> ModuleSpec | None:
    """The spec of the other `trio` on sys.path, or None: any package of that name but ours."""
    for entry in sys.path:
        spec = PathFinder.find_spec("trio", [entry])
        if spec is None or not spec.origin or not spec.submodule_search_locations:
            continue
        if not os.path.exists(os.path.join(os.path.dirname(spec.origin), "_beside.py")):
            return spec
    return None


def attribute(name: str) -> Any:
    """`trio.<name>` for a name that is not ours; AttributeError where nobody has it."""
    # inspect, mock and pickling probe every module for such names: they must not load the library.
    probe = name.startswith("__") and name != "__version__"
    if NAMESPACE not in sys.modules and (probe or locate() is None):
        reason = "" if probe else " (this is trio-vlm; the async library `trio` is not installed)"
        raise AttributeError(f"module 'trio' has no attribute {name!r}{reason}", name=name)
    try:
        library = importlib.import_module(NAMESPACE)
    except ImportError as error:
        message = f"module 'trio' has no attribute {name!r}: the async library failed: {error}"
        raise AttributeError(message, name=name) from error
    return getattr(library, name)


def names() -> list[str]:
    """What `dir(trio)` adds once the async library is loaded."""
    library = sys.modules.get(NAMESPACE)
    return [] if library is None else [name for name in dir(library) if not name.startswith("__")]


def install() -> None:
    """Puts the finder at the end of sys.meta_path, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder:
    """Submodules of the async library, and NAMESPACE itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.rpartition(".")[0] != "trio":
            return None
        other = locate()
        if other is None or other.origin is None:
            return None
        if fullname == NAMESPACE:
            # No search locations: its parent stays `trio`, and so do its relative imports.
            return spec_from_file_location(
                NAMESPACE,
                other.origin,
                loader=_InitLoader(NAMESPACE, other.origin),
                submodule_search_locations=None,
            )
        spec = PathFinder.find_spec(fullname, other.submodule_search_locations)
        if spec is not None and spec.loader is not None:
            loader: Any = _AfterInit(spec.loader)
            spec.loader = loader
        return spec


class _InitLoader(SourceFileLoader):
    """Runs the library's `__init__.py` as `trio`, and keeps our module's hooks our own."""

    def exec_module(self, module: ModuleType) -> None:
        code: CodeType | None = self.get_code(NAMESPACE)
        assert code is not None, self.path
        ours = sys.modules["trio"]
        kind, hook = ours.__class__, ours.__dict__["__getattr__"]
        module.__name__ = "trio"
        try:
            exec(code, module.__dict__)
        finally:
            # It replaces the class or `__getattr__` of sys.modules["trio"] for deprecated names.
            theirs = ours.__dict__["__getattr__"]
            ours.__class__ = kind
            ours.__dict__["__getattr__"] = hook
        if theirs is not hook:
            module.__dict__["__getattr__"] = theirs


class _AfterInit:
    """Sees that `trio/__init__.py` has run, as ever, then leaves a submodule to its own loader."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        # Not in find_spec: Python holds the lock of all imports there, and threads would hang.
        with _unlocked(spec.name):
            importlib.import_module(NAMESPACE)
        loaded = sys.modules.get(spec.name)
        if loaded is None:
            spec.loader = self._loader
            return self._loader.create_module(spec)
        return loaded

    def exec_module(self, module: ModuleType) -> None:
        """Reached only for a module that `trio/__init__.py` has loaded: nothing is left to do."""
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader


@contextmanager
def _unlocked(name: str) -> Iterator[None]:
    """Gives up this thread's import lock of one module for a while.

    Else a thread that waits with it for the library would block the thread that loads the library.
    """
    bootstrap: Any = importlib._bootstrap
    lock = bootstrap._get_module_lock(name)
    held = lock.owner == get_ident()
    if held:
        lock.release()
    try:
        yield
    finally:
        if held:
            lock.acquire()
