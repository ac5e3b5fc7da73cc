"""Recorded cases on disk: `DIR/<kind>/index.json` and one `.safetensors` file per case."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trio.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Case:
    """One recorded run: its settings and facts, and where its tensors lie."""

    kind: str
    facts: dict[str, Any]
    folder: Path
    models: dict[str, Any]

    @property
    def name(self) -> str:
        return self.fact("name")

    def fact(self, key: str) -> Any:
        """An entry of the index.

        Raises:
            UserError: it is not there.
        """
        return self.of(self.facts, key)

    def one_of(self, key: str, known: Mapping[str, T]) -> T:
        """What an entry of the index stands for; raises like `fact`, and where nothing is known."""
        value = self.fact(key)
        if value not in known:
            raise UserError(f"case {self.name}: {key} {value!r} is none of {', '.join(known)}")
        return known[value]

    def of(self, facts: Any, key: str) -> Any:
        """An entry of a part of this case, such as a stage; raises like `fact`."""
        if not isinstance(facts, dict) or key not in facts:
            name = self.facts.get("name")
            raise UserError(f"{self.folder / 'index.json'}: no {key!r} in a part of case {name}")
        return facts[key]

    def tensors(self) -> Tensors:
        return Tensors(self.folder / self.fact("file"))

    def model(self) -> tuple[dict[str, Any], Tensors]:
        """Configuration and weights of the case's model."""
        tag = self.fact("model")
        entry = self.models.get(tag)
        if not isinstance(entry, dict) or "config" not in entry or "file" not in entry:
            raise UserError(
                f"{self.folder / 'index.json'}: no config and file for model {tag!r} of case "
                f"{self.name}"
            )
        return entry["config"], Tensors(self.folder / entry["file"])


class Tensors:
    """Tensors of one file; asking for one that is missing names file and tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._asked: set[str] = set()
        try:
            self.all = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.all:
            raise UserError(f"{self.path}: tensor {name!r} is missing")
        self._asked.add(name)
        return self.all[name]

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.all else None

    def never_asked(self) -> list[str]:
        return sorted(self.all.keys() - self._asked)


def read_cases(directory: Path) -> list[Case]:
    """All cases below `directory`, by folder, or those of the folder itself.

    Raises:
        UserError: no cases, or an index that cannot be read.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give the one that holds the golden data")
    indexes = sorted(directory.glob("*/index.json"))
    if (directory / "index.json").is_file():
        indexes = [directory.resolve() / "index.json"]
    if not indexes:
        raise UserError(f"{directory} holds no <kind>/index.json; give the golden data's directory")
    return [case for index in indexes for case in _read_index(index)]


def _read_index(index: Path) -> list[Case]:
    try:
        content = json.loads(index.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{index}: not readable as JSON ({error})") from error
    cases = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(cases, list) or not cases:
        raise UserError(f"{index}: no list of cases in it")
    if not all(isinstance(facts, dict) and "name" in facts for facts in cases):
        raise UserError(f"{index}: every case must be an object with a name")
    models = content.get("models", {})
    return [Case(index.parent.name, facts, index.parent, models) for facts in cases]
