"""Checks that a model has not been changed since its adapter was made.

Scores are worked out from weights of norms and projections, past the modules that hold them. What
is put on a model later, an adapter or a quantisation, replaces these modules or wraps them, and the
weights at hand would be the old ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

from torch import nn

from trio.decoder.weights import DTYPES
from trio.errors import UserError

_HEAD = "lm_head"
_BY_HAND = {"input_layernorm", "k_proj", "v_proj", "k_norm", _HEAD}
_State = tuple[Any, ...]


class Unchanged:
    """Remembers the modules of a text decoder and its output head, and where a model has them.

    model: the whole model.
    text, lm_head: parts of it.
    """

    def __init__(self, model: nn.Module, text: Any, lm_head: nn.Module) -> None:
        self._model = model
        self._places = {
            place: (module, _HEAD if module is lm_head else "")
            for place, module in model.named_modules()
            if module is text or module is lm_head
        }
        self._seen = {place: _states(*part) for place, part in self._places.items()}

    def check(self) -> None:
        """Raises UserError, with what is another now, unless all is as it was."""
        found = next(self._changes(), None)
        if found is not None:
            raise UserError(
                f"{found} since this {type(self._model).__name__} was patched or its Engine made, "
                "and tokens are scored by the weights that it had then: unpatch, add the adapter "
                "and merge it (merge_and_unload), patch again or make the Engine again; what "
                "cannot be merged, as a quantisation or a hook, is not supported"
            )

    def _changes(self) -> Iterator[str]:
        for place, (module, name) in self._places.items():
            now = self._now(place)
            if getattr(now, "_orig_mod", now) is not module:  # torch.compile wraps
                yield f"{place} has become another module ({_kind(type(now))})"
            elif (states := _states(module, name)) != self._seen[place]:
                yield from _differences(place, self._seen[place], states)

    def _now(self, place: str) -> Any:
        whole: Any = self._model
        return reduce(lambda part, name: getattr(part, name, None), place.split("."), whole)


def hooked(module: Any, *, leaving: bool) -> bool:
    """Whether a hook may change what enters a module or, if asked for, what leaves it."""
    return bool(module._forward_pre_hooks) or (leaving and bool(module._forward_hooks))


def _states(root: nn.Module, name: str) -> dict[str, _State]:
    """By path what each module is; of those past which weights are read, what is put over it."""
    found: dict[str, _State] = {}
    left: list[tuple[str, str, Any]] = [("", name, root)]
    while left:
        path, name, module = left.pop()
        own = module.__dict__
        weight = own["_parameters"].get("weight")
        found[path] = (
            module,
            type(module),
            None if weight is None else (type(weight), weight.dtype in DTYPES),
            _put_over(name, module),
        )
        left += [
            (f"{path}.{child}", child, part)
            for child, part in reversed(own["_modules"].items())
            if part is not None
        ]
    return found


def _put_over(name: str, module: Any) -> Any:
    """Of layers and their attention what may change what enters, of projections and norms all."""
    by_hand = name in _BY_HAND
    if not (by_hand or name == "self_attn" or name.isdecimal()):
        return None
    return module.__dict__.get("forward"), hooked(module, leaving=by_hand)


def _differences(place: str, before: dict[str, _State], now: dict[str, _State]) -> Iterator[str]:
    for path in [*before, *(path for path in now if path not in before)]:
        old, new = before.get(path), now.get(path)
        if old == new:
            continue
        where = place + path
        if old is None or new is None:
            yield f"{where} has {'come' if old is None else 'gone'}"
        elif old[0] is not new[0] or old[1] is not new[1]:
            yield f"{where} has become another module ({_kind(new[1])})"
        elif old[2] != new[2]:
            yield f"{where}.weight has become another kind of number"
        else:
            yield f"{where} has got a hook or another forward"


def _kind(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
