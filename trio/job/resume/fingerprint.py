"""What a run's answers depend on, so that rows of two different runs are never mixed.

The settings that decide the rows, the files of the model, our version. Kept with the manifest and
compared on resume: a difference in these is refused by name. Libraries are kept as well, but
another version of one is only mentioned: it may change an answer in its last digits, and a run of
days must survive a new image. No torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trio import bundled
from trio.errors import UserError
from trio.job.settings import Settings
from trio.version import VERSION, of_library

LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")
READ_SUFFIXES = frozenset(
    (".json", ".jinja", ".txt", ".model", ".safetensors", ".tiktoken", ".vocab", ".spm", ".bpe")
)
# of files that from_pretrained may read; others (README, *.bin, *.pt, images) it never does here
TEMPLATES = "additional_chat_templates"
EDGE_BYTES = 1 << 20
# of a weight file that are hashed, at either end


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    settings: Mapping[str, Any]
    # those with results=True; the commit of a hub id is among them
    model_files: Mapping[str, str]
    # name to digest; empty for a hub id
    version: str
    # of trio-vlm
    libraries: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Fingerprint:
        return cls(**json.loads(text))

    def differences(self, now: Fingerprint) -> list[str]:
        """What would give other rows now, each named in a few words."""
        out = []
        for name in {**self.settings, **now.settings}:
            old, new = self.settings.get(name), now.settings.get(name)
            if old != new:
                out.append(f"{name}: {old!r}, now {new!r}")
        changed = {name for name, _ in self.model_files.items() ^ now.model_files.items()}
        return out + [f"file {name} has changed" for name in sorted(changed)]

    def notices(self, now: Fingerprint) -> list[str]:
        """Lines about what may change answers a little and is not refused."""
        return [
            f"{name} was {self.libraries.get(name)} and is {version} now: rows of the two parts"
            " of this run may differ in their last digits"
            for name, version in now.libraries.items()
            if version != self.libraries.get(name)
        ]


def take(config: Settings, also: Mapping[str, str] | None = None) -> Fingerprint:
    """The fingerprint of a run with these settings, here and now.

    Args:
        config: the settings.
        also: digests of further files that decide the rows, by name.

    Raises:
        UserError: a file of the model cannot be read.
    """
    directory = model_directory(config.model.model)
    tower = config.model.text_tower and model_directory(config.model.text_tower, bundled.CLIP)
    return Fingerprint(
        settings=config.results(),
        model_files={
            **(model_files(directory) if directory else {}),
            **(model_files(tower, "--text-tower", " (of --text-tower)") if tower else {}),
            **module_files(config),
            **(also or {}),
        },
        version=VERSION,
        libraries={name: of_library(name) for name in LIBRARIES},
    )


def module_files(config: Settings) -> dict[str, str]:
    """Digest of each module that --adapters and --method name; empty where it is not here."""
    adapters = {own.partition("=")[2]: "--adapters" for own in config.model.adapters}
    used = (config.pruning.method, *(one.pruning.method for one in config.compared))
    methods = {method: "--method" for method in used if ":" in method}
    out = {}
    for name, flag in (adapters | methods).items():
        module = name.partition(":")[0]
        try:
            spec = importlib.util.find_spec(module)
        except Exception:  # its package may be broken, which engines will say
            spec = None
        origin = Path(spec.origin if spec and spec.origin else "")
        digest = file_digest(origin) if origin.is_file() else ""
        out[f"{module} (of {flag})"] = digest
    return out


def model_directory(model: str, demo: Path = bundled.MODEL) -> str | None:
    """Where a model lies on this machine, None for a hub id; `demo`: what DEMO stands for."""
    path = os.path.expanduser(bundled.directory_of(model, demo))
    return path if os.path.isdir(path) else None


def model_files(directory: str, flag: str = "--model", suffix: str = "") -> dict[str, str]:
    """SHA-256 of every file in a model's directory that loading it could read, by name.

    Of weight files that of the size and the first and last megabyte. So training that goes on is
    noticed, as it changes all weights; an edit of a few numbers in the middle is not.

    Args:
        directory: the model's.
        flag: that it was given with, for messages.
        suffix: of each name.

    Raises:
        UserError: naming the file that cannot be read.
    """
    root = Path(directory)
    read = sorted(
        path
        for path in (*root.glob("*"), *(root / TEMPLATES).glob("*"))
        if path.suffix in READ_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    try:
        return {path.relative_to(root).as_posix() + suffix: file_digest(path) for path in read}
    except OSError as error:
        raise UserError(f"{flag} {directory}: a file cannot be read: {error}") from error


def file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        if path.suffix != ".safetensors":
            return hashlib.file_digest(stream, "sha256").hexdigest()
        size = path.stat().st_size
        digest = hashlib.sha256(b"%d " % size + stream.read(EDGE_BYTES))
        stream.seek(max(EDGE_BYTES, size - EDGE_BYTES))
        digest.update(stream.read())
        return digest.hexdigest()
