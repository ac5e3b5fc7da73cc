"""An instance attribute that stands in for a method, and leaves no trace when it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import nn


class Override:
    """Callable put into one module's `__dict__` under the name of a method.

    It refers to its module, not to a bound method of it, so `copy.deepcopy` and `pickle` of the
    module give a copy that calls itself and not the module it was copied from. An attribute that
    was there before (accelerate puts its hooks there) is called as the original and comes back.
    """

    name: str

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous: Callable[..., Any] | None = module.__dict__.get(self.name)

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """The override of this kind that sits on the module, if any."""
        found = module.__dict__.get(cls.name)
        return found if isinstance(found, cls) else None

    @property
    def original(self) -> Callable[..., Any]:
        if self.previous is not None:
            return self.previous
        return getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """For `inspect.signature`, by which `generate` decides what to pass."""
        return self.original

    def install(self) -> None:
        setattr(self.module, self.name, self)

    def remove(self) -> None:
        assert self.of(self.module) is self, f"another {self.name} sits on the module"
        if self.previous is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self.previous)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no call")
