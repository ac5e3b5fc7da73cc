"""What `--model_args` says, read by what reads the jobs' flags. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trio import bundled
from trio.errors import UserError, suggestion
from trio.job.settings import FIELDS, Settings, made_of
from trio.pruning.method_registry import asks_for_text_tower
from trio.values import Value, text

MAX_NEW_TOKENS = 1024
"""Of tasks that do not say it: a short answer pays nothing for it, and a long one is not cut."""
_WITH_PRUNING = ("retention", "schedule")
_OWN = ("seed", "max_new_tokens", "batch_tokens", "max_running", "system_prompt")
_NAMES = {"pretrained": "model"} | {
    name: name
    for name, setting in FIELDS.items()
    if name in _OWN or (setting.group in ("model", "pruning") and name != "model")
}
"""By the name in `--model_args`: that of the job's setting."""
_VALUES = {name: FIELDS[field].value for name, field in _NAMES.items()} | {
    "device": Value(read=text, unit="DEVICE")
}
_BATCH = ("batch_size", "max_batch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelArgs:
    """What the engine is made of."""

    settings: Settings
    """Of a job with the same flags; what is none of a model's is as built in."""
    device: str | None
    """None takes the GPU if there is one."""

    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments of `Engine.from_pretrained`, the model's name apart."""
        model, cluster = self.settings.model, self.settings.cluster
        limits = {"batch_tokens": cluster.batch_tokens, "max_running": cluster.max_running}
        return {
            "device": self.device,
            # What auto is depends on the device, which the engine knows.
            "dtype": None if model.dtype == "auto" else model.dtype,
            "revision": model.revision,
            "min_pixels": model.min_pixels,
            "max_pixels": model.max_pixels,
            "text_tower": model.text_tower,
            "text_tower_revision": model.text_tower_revision,
            "pruning": self.settings.pruning,
            "sampling": self.settings.sampling,
            "system": self.settings.input.system_prompt,
        } | {name: value for name, value in limits.items() if value is not None}


def read_model_args(given: Mapping[str, Any]) -> ModelArgs:
    """Settings of `--model_args`, with `--batch_size` and `--device`.

    Args:
        given: values by name, as lmms-eval splits them: text, numbers and truth values.

    Raises:
        UserError: an unknown name, a value that it cannot have, or settings that do not go
            together.
    """
    values = {name: _read(name, value) for name, value in given.items() if name not in _BATCH}
    for name in _BATCH:
        if str(given.get(name, 1)) != "1":
            raise UserError(
                f"{name} {given[name]}: the engine fills its batches itself; leave it out, or "
                "bound them with batch_tokens and max_running in --model_args"
            )
    if "pretrained" not in values:
        raise UserError("--model_args: pretrained is missing: a hub id, a directory, or demo")
    _check_prunes(values)
    device = values.pop("device", None)
    fields = {"max_new_tokens": MAX_NEW_TOKENS} | {_NAMES[n]: v for n, v in values.items()}
    settings = made_of(**fields)
    model = settings.model
    tower_asked = asks_for_text_tower(settings.pruning) and model.text_tower is None
    if model.model == bundled.NAME and tower_asked:
        settings = settings.replace(text_tower=bundled.NAME)
    return ModelArgs(settings=settings, device=device)


def _check_prunes(values: Mapping[str, Any]) -> None:
    """A method that nobody tells how much to keep would leave everything, and be published."""
    choosing = [name for name in ("method", "encoder") if values.get(name, "none") != "none"]
    if choosing and not any(name in values for name in _WITH_PRUNING):
        raise UserError(
            f"--model_args: {choosing[0]}={values[choosing[0]]} keeps every token without "
            "retention or schedule; give one of them"
        )


def _read(name: str, value: Any) -> Any:
    if name not in _VALUES:
        raise UserError(f"--model_args: unknown name {name!r}{suggestion(name, _VALUES)}")
    reader = _VALUES[name]
    try:
        return reader.read(_unquoted(value))
    except UserError as error:
        hint = "" if isinstance(value, str) else _quotes(name, value, reader)
        raise UserError(f"--model_args: {name}: {error}{hint}") from error


def _unquoted(value: Any) -> Any:
    """Without the quotes that keep commas together, which lmms-eval leaves in place."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value


def _quotes(name: str, value: Any, reader: Value) -> str:
    """A hint where what lmms-eval took for a number was meant as text."""
    try:
        reader.read(str(value))
    except UserError:
        return ""
    return f'; lmms-eval took it for a number: put it in quotes, {name}="..."'
