"""Checks a checkpoint's files; a fault is one line that names the file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from trio.errors import UserError, first_line

INDEX = "model.safetensors.index.json"
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "chat_template.json",
    INDEX,
)
"""Those that loading may read; transformers passes over some of them when they are broken."""
_WOULD_BE_MISSED = re.compile(
    r"\.(layers|blocks)\.\d+\.(?!.*rotary_emb)"
    r"|(weight|input|[kv])_scale(_inv)?$|\.(scales|qweight|qzeros|absmax|quant_map|quant_state)\b"
)
"""Tensors without which a model answers otherwise. Others are left over from older versions."""
_LFS = b"version https://git-lfs"
_SHOWN = 3
"""Tensors that a message names."""


def check_directory(model: str) -> None:
    """Look at a directory, or at what can only be meant as one.

    Raises:
        UserError: it is no checkpoint, or a file in it that is JSON by its name is not.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{model!r} is no model directory: it has no config.json")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"{model!r} has no *.safetensors; other weight files are not loaded")
        _check_json(path)
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(f"there is no model directory {model!r}")


def check_tensors(model: str, info: Mapping[str, Any]) -> None:
    """Look at what transformers says of the weights that it has loaded.

    info: its `output_loading_info`; with tensors of other shapes in it, not raised.

    Raises:
        UserError: tensors of the model are not in the files or have another shape there, or the
            files hold layers or scales that the model has no place for.
    """
    misfits = sorted(info["mismatched_keys"])
    if misfits:
        shown = [f"{name} is {list(is_)}, not {list(by)}" for name, is_, by in misfits]
        raise UserError(
            f"{model!r}: weights have other shapes than config.json says: {_some(shown)}; take "
            "both from one checkpoint"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{model!r} is incomplete: its weights lack {_some(missing)}; save or copy it again"
        )
    surplus = sorted(name for name in info["unexpected_keys"] if _WOULD_BE_MISSED.search(name))
    if surplus:
        raise UserError(
            f"{model!r}: config.json describes a model without {_some(surplus)}, which the weights "
            "have; take both from one checkpoint, and one that is not quantised"
        )


def check_files(model: str, revision: str | None) -> None:
    """Look at the files one by one, after something could not be loaded.

    Raises:
        UserError: one is missing or cannot be read, by name.
    """
    folder = _folder(model, revision)
    if folder is None:
        return
    _check_json(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{model!r} is incomplete: it has no tokenizer.json; save its tokenizer as a fast one "
            "there"
        )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: no readable safetensors file: {_cure(path, error)}"
            ) from error


def _check_json(folder: Path) -> None:
    for path in (folder / name for name in JSON_FILES):
        if not path.is_file():
            continue
        try:
            if not isinstance(json.loads(path.read_bytes()), dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON: {_cure(path, error)}") from error


def _cure(path: Path, error: Exception) -> str:
    """What an unreadable file is, and what to do."""
    try:
        with path.open("rb") as stream:
            pointer = stream.read(len(_LFS)) == _LFS
    except OSError:
        return first_line(error)
    if pointer:
        return "it is the pointer that Git LFS leaves in its place; run git lfs pull"
    return f"{first_line(error)}; copy or download it again"


def _folder(model: str, revision: str | None) -> Path | None:
    """Where the files lie on this machine, as far as they are there."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache
        return None


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
