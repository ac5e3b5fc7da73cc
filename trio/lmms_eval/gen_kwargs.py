"""`generation_kwargs` of a task, as the engine's sampling and strings that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trio.engine.request import Sampling
from trio.errors import UserError, suggestion
from trio.values import boolean, settings_of

_SAMPLING = settings_of(Sampling())
_TAKEN = ("max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", "until")


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """How one answer is made and where it ends."""

    sampling: Sampling
    stops: tuple[str, ...]
    """The answer ends before the first of these, as text; the model itself goes on behind it."""


def read_generation(given: Mapping[str, Any], default: Sampling, seed: int) -> Generation:
    """What a task asks for; None stands for what is not given.

    As in transformers, `do_sample: false` makes a temperature void, and `do_sample: true` without
    one means 1. Where nothing is drawn, top_p has no effect and is not looked at.

    Args:
        default: for what the task leaves open.
        seed: of this answer, if tokens are drawn.

    Raises:
        UserError: a name that the engine does not follow, or a value that it cannot have.
    """
    known = {name: value for name, value in given.items() if value is not None}
    for name in known:
        if name not in _TAKEN:
            raise UserError(
                f"generation_kwargs: {name} is not followed{suggestion(name, _TAKEN)}; taken are "
                + ", ".join(_TAKEN)
            )
    if (beams := known.get("num_beams", 1)) != 1:
        raise UserError(f"generation_kwargs: num_beams {beams}: there is no beam search, only 1")
    changes: dict[str, Any] = {"temperature": _temperature(known)}
    if changes["temperature"] > 0:
        changes |= {"seed": seed, "top_p": _read("top_p", known)}
    if "max_new_tokens" in known:
        changes["max_new_tokens"] = _read("max_new_tokens", known)
    return Generation(sampling=replace(default, **changes), stops=_stops(known.get("until")))


def cut(answer: str, stops: Sequence[str]) -> str:
    """The answer before the first of the stop strings."""
    return answer[: min((at for stop in stops if (at := answer.find(stop)) >= 0), default=None)]


def _temperature(known: Mapping[str, Any]) -> float:
    drawn = boolean(known["do_sample"]) if "do_sample" in known else None
    given: float | None = _read("temperature", known)
    if drawn and given == 0:
        raise UserError("generation_kwargs: do_sample is true and temperature 0; give one of them")
    if given is None:
        return 1.0 if drawn else 0.0
    return 0.0 if drawn is False else given


def _read(name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        return None
    try:
        return _SAMPLING[name].value.read(known[name])
    except UserError as error:
        raise UserError(f"generation_kwargs: {name}: {error}") from error


def _stops(until: Any) -> tuple[str, ...]:
    stops = [until] if isinstance(until, str) else [] if until is None else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"generation_kwargs: until must be text or a list of texts, got {until!r}")
    return tuple(stop for stop in stops if stop)
