"""Presets in YAML: those that come with the package, and a user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml

from trio.errors import UserError, first_line, suggestion
from trio.values import several, text
from trio.vqa.aggregates import METRICS, metric_named
from trio.vqa.presets.column_expressions import ColumnExpression, column_expression
from trio.vqa.presets.preset import PictureJoin, Preset
from trio.vqa.presets.prompt_template import PromptTemplate

T = TypeVar("T")
_ENDINGS = (".yaml", ".yml")
_STANDS_FOR = {"box": "box_pixels"}
"""Fields of metrics that are made of another one and the picture."""


def preset_named(name_or_path: str) -> Preset:
    """A preset by its name, or that of a YAML file.

    Raises:
        UserError: no such preset, or the file is none.
    """
    if name_or_path in known_presets():
        return known_presets()[name_or_path]
    if name_or_path.endswith(_ENDINGS):
        return read_preset(name_or_path)
    raise UserError(
        f"unknown preset {name_or_path!r}{suggestion(name_or_path, known_presets())}; known: "
        f"{', '.join(known_presets())}; or give a file that ends in {' or '.join(_ENDINGS)}"
    )


@cache
def known_presets() -> Mapping[str, Preset]:
    """Those that come with the package, by name."""
    source = files("trio.vqa.presets").joinpath("presets.yaml")
    written = yaml.safe_load(source.read_text(encoding="utf-8"))
    return MappingProxyType(
        {name: _preset(values, f"preset {name!r}", name) for name, values in written.items()}
    )


def read_preset(path: str | Path) -> Preset:
    """A preset of a user's own; its name is the file's unless it gives one.

    Raises:
        UserError: the file cannot be read or holds anything else; names file and key.
    """
    try:
        written = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"preset {str(path)!r} cannot be read: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return _preset(written, str(path), Path(path).stem)


def _preset(written: Any, source: str, name: str) -> Preset:
    def read(values: Any) -> Preset:
        return _checked(Preset(**{"name": name} | _read(values, Preset, _READERS)))

    return _value(read, written, source)


def _checked(preset: Preset) -> Preset:
    """The preset itself, if its fields are those of its metric."""
    needed = metric_named(preset.metric).truth if preset.metric else ()
    needed = tuple(_STANDS_FOR.get(name, name) for name in needed if name not in preset.fields)
    lacking = [repr(name) for name in needed if name not in preset.fields]
    if lacking:
        raise UserError(
            f"metric {preset.metric!r} needs {', '.join(lacking)}; say under fields of which "
            "columns to make it"
        )
    return preset


def _read(written: Any, kind: type, readers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """The arguments of a dataclass from a mapping."""
    if not isinstance(written, dict):
        raise UserError(f"expected keys with values, as in 'prompt: ...'; got {written!r:.60}")
    for key in written:
        if key not in readers:
            close = suggestion(str(key), readers)
            raise UserError(f"unknown key {key!r}{close}; known: {', '.join(readers)}")
    for each in fields(kind):
        if _needed(each) and each.name not in written:
            raise UserError(f"no key {each.name!r}, which is needed")
    return {key: _value(readers[key], value, key) for key, value in written.items()}


def _needed(each: Field[Any]) -> bool:
    given = each.default is MISSING and each.default_factory is MISSING
    return given and each.name != "name"


def _value(read: Callable[[Any], T], value: Any, where: str) -> T:
    """What is read of a value; errors say where it stands."""
    try:
        return read(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _template(value: Any) -> PromptTemplate:
    return PromptTemplate(text(value))


def _join(value: Any) -> PictureJoin:
    readers = dict.fromkeys((each.name for each in fields(PictureJoin)), text)
    return PictureJoin(**_read(value, PictureJoin, readers))


def _fields(value: Any) -> dict[str, ColumnExpression]:
    if not isinstance(value, dict):
        raise UserError(f"expected names with columns, as in 'answer: answer'; got {value!r:.60}")
    return {
        text(name): _value(column_expression, written, str(name)) for name, written in value.items()
    }


def _metric(value: Any) -> str:
    name = text(value)
    if name not in METRICS:
        raise UserError(f"no metric {name!r}{suggestion(name, METRICS)}; {', '.join(METRICS)}")
    return name


_TEXTS = several(text)
_READERS: dict[str, Callable[[Any], Any]] = {
    "name": text,
    "repositories": _TEXTS,
    "config": text,
    "split": text,
    "splits": _TEXTS,
    "files": _TEXTS,
    "image": text,
    "images": _join,
    "id": _TEXTS,
    "prompt": _template,
    "fields": _fields,
    "metric": _metric,
    "explode": text,
    "missing": _TEXTS,
    "optional": _TEXTS,
    "notice": text,
}
