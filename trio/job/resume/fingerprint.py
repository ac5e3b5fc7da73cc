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
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from trio import bundled
from trio.errors import UserError, first_line
from trio.job.settings import Settings
from trio.version import VERSION

LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")
READ_SUFFIXES = frozenset(
    (".json", ".jinja", ".txt", ".model", ".safetensors", ".tiktoken", ".vocab", ".spm", ".bpe")
)
# of files that from_pretrained may read; others (README, *.bin, *.pt, images) it never does here
TEMPLATES = "additional_chat_templates"
EDGE_BYTES = 1 << 20
# of a weight file that are hashed, at either end
HUB_TIMEOUT_S = 20.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
        """What would give other rows now, each named in a few words; of another version, which
        may call its settings otherwise, that alone."""
        if self.version != now.version:
            return [f"another version of this package: {self.version}, now {now.version}"]
        out = []
        for name in dict.fromkeys((*self.settings, *now.settings)):
            old, new = self.settings.get(name), now.settings.get(name)
            if old != new:
                out.append(f"{name}: {old!r}, now {new!r}")
        for name in sorted({*self.model_files, *now.model_files}):
            before, after = self.model_files.get(name), now.model_files.get(name)
            if before != after:
                how = "is new" if before is None else "is gone" if after is None else "has changed"
                out.append(f"model file {name} {how}")
        return out

    def notices(self, now: Fingerprint) -> list[str]:
        """Lines about what may change answers a little and is not refused."""
        return [
            f"{name} was {self.libraries.get(name)} and is {version} now: rows of the two parts"
            " of this run may differ in their last digits"
            for name, version in now.libraries.items()
            if version != self.libraries.get(name)
        ]


def take(config: Settings) -> Fingerprint:
    """The fingerprint of a run with these settings, here and now.

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
        },
        version=VERSION,
        libraries={name: _installed(name) for name in LIBRARIES},
    )


def module_files(config: Settings) -> dict[str, str]:
    """Digest of each module that --adapters and --method name; empty where it is not here."""
    adapters = {own.partition("=")[2]: "--adapters" for own in config.model.adapters}
    methods = {config.pruning.method: "--method"} if ":" in config.pruning.method else {}
    out = {}
    for name, flag in (adapters | methods).items():
        module = name.partition(":")[0]
        try:
            spec = importlib.util.find_spec(module)
        except Exception:  # its package may be broken, which engines will say
            spec = None
        origin = Path(spec.origin if spec and spec.origin else "")
        digest = hashlib.sha256(origin.read_bytes()).hexdigest() if origin.is_file() else ""
        out[f"{module} (of {flag})"] = digest
    return out


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


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
        return {path.relative_to(root).as_posix() + suffix: _digest(path) for path in read}
    except OSError as error:
        raise UserError(f"{flag} {directory}: a file cannot be read: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        if path.suffix != ".safetensors":
            return hashlib.file_digest(stream, "sha256").hexdigest()
        size = path.stat().st_size
        digest = hashlib.sha256(b"%d " % size + stream.read(EDGE_BYTES))
        stream.seek(max(EDGE_BYTES, size - EDGE_BYTES))
        digest.update(stream.read())
        return digest.hexdigest()


def pin_revision(config: Settings, earlier: Settings | None = None) -> Settings:
    """Settings that name the commit of each hub id, so that every node, now and later, loads it.

    A run that goes on keeps to the commit it began with, unless another one is asked for.

    Raises:
        UserError: a revision of a directory, or a hub id whose commit cannot be found out.
    """
    pinned = {
        revision: _pinned(config, earlier, model, revision)
        for model, revision in (("model", "revision"), ("text_tower", "text_tower_revision"))
    }
    return config.replace(**pinned)


def _pinned(config: Settings, earlier: Settings | None, model: str, revision: str) -> str | None:
    """The commit of one hub id; `model` and `revision` are the names of its settings."""
    flag, revision_flag = (f"--{name.replace('_', '-')}" for name in (model, revision))
    name, asked = config.get(model), config.get(revision)
    if name is None:
        if asked is not None:
            raise UserError(f"{revision_flag} {asked} goes with {flag}; give both or none")
        return None
    if model_directory(name) is not None:
        if asked is not None:
            raise UserError(
                f"{revision_flag} {asked}: {flag} {name} is no hub id; leave {revision_flag} out"
            )
        return None
    if asked is None and earlier is not None and earlier.get(model) == name:
        kept: str | None = earlier.get(revision)
        return kept
    return commit(name, asked, flag)


def commit(model: str, revision: str | None, flag: str = "--model") -> str:
    """The commit that a revision of a hub id stands for: asked of the hub, else from the cache.

    flag: that the model was given with, for messages.

    Raises:
        UserError: neither knows.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    revision = revision or constants.DEFAULT_REVISION
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        found = HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT_S).sha
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"{flag} {model}: the hub has no revision {revision!r} of it that may be read"
            f" ({first_line(error)}); check the name, {flag}'s revision and HF_TOKEN"
        ) from error
    except Exception as error:  # without network it depends on the client's version
        try:
            cached = snapshot_download(model, revision=revision, local_files_only=True)
        except OSError:
            raise UserError(
                f"{flag} {model}: the hub does not answer ({first_line(error)}), and no"
                f" {revision!r} of it is in the cache {constants.HF_HUB_CACHE}; download it first,"
                " or give a directory"
            ) from error
        return Path(cached).name
    if found is None:
        raise UserError(f"{flag} {model}: the hub names no commit for {revision!r}; give one")
    return found
