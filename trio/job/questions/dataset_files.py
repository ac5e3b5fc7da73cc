"""Where the files of a preset's data set lie: on the Hub, or below a directory of its layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from trio.errors import UserError
from trio.job.input.columns import OWN
from trio.job.input.joined_pictures import PictureFiles
from trio.job.input.kinds.shard_kinds import PARQUET
from trio.job.input.manifest import expand
from trio.job.questions.question_settings import Questions
from trio.job.resume.fingerprint import file_digest
from trio.job.storage import list_files, locate
from trio.vqa.presets.preset import Preset

HUB = "hf://datasets/"
PICTURES = "pictures"
"""Name of the joined files' digest in a fingerprint."""
_GLOB = "*?["


def question_paths(
    preset: Preset, given: Sequence[str], say: Callable[[str], None]
) -> tuple[str, ...]:
    """What to read of an input.

    Args:
        preset: of the data set.
        given: files, patterns or directories; none: the data set's repository on the Hub.
        say: takes a line where a directory has another layout, and is read whole.

    Raises:
        UserError: the data set is to be had under none of its names.
    """
    if given:
        return tuple(_below(path, preset.patterns(), say) for path in given)
    return (_on_hub(preset),)


def _below(path: str, patterns: Sequence[str], say: Callable[[str], None]) -> str:
    if any(letter in path for letter in _GLOB) or not patterns:
        return path
    found = _first(path, patterns)
    if found is None:
        if _is_file(path):
            return path
        say(f"--input {path}: nothing there is called {patterns[0]}: all Parquet files are read")
    return found or path


def _first(path: str, patterns: Sequence[str]) -> str | None:
    """The first pattern below a directory by which there are files."""
    for pattern in patterns:
        wanted = f"{path.rstrip('/')}/{pattern}"
        try:
            if list_files(locate(wanted)):
                return wanted
        except (OSError, ValueError):
            continue
    return None


def _is_file(path: str) -> bool:
    location = locate(path)
    try:
        return [info.path for info in list_files(location)] == [location.path]
    except (OSError, ValueError):
        return False


def _on_hub(preset: Preset) -> str:
    if not preset.repositories:
        raise UserError(f"preset {preset.name!r} names no repository: give --input")
    for repository in preset.repositories:
        if (found := _first(HUB + repository, preset.patterns())) is not None:
            return found
    tried = " nor ".join(preset.repositories)
    raise UserError(
        f"preset {preset.name}: the Hub gives {preset.patterns()[0]} of neither {tried}; check the"
        " network, the split and HF_TOKEN, or give as --input a directory of the same layout"
    )


def picture_files(
    preset: Preset, questions: Questions, paths: Sequence[str], say: Callable[[str], None]
) -> PictureFiles | None:
    """The pictures that a preset joins; None where they lie beside the questions.

    Raises:
        UserError: they are not to be found, or cannot be read.
    """
    join = preset.images
    if join is None:
        if questions.pictures:
            raise UserError("--pictures: no preset here joins pictures of other files")
        return None
    wanted: list[str] = list(questions.pictures)
    if not wanted:
        roots = {path.partition(f"/{preset.config}/")[0] for path in paths}
        wanted = [f for root in sorted(roots) if (f := _first(root, preset.picture_patterns()))]
    if not wanted:
        raise UserError(
            f"preset {preset.name}: its pictures lie in files of their own"
            f" ({preset.picture_patterns()[0]}): give them with --pictures"
        )
    found = expand(wanted, None, say)
    if other := [one for one in found if one.kind != PARQUET]:
        raise UserError(f"--pictures: {other[0].location.uri}: give Parquet files")
    files = PictureFiles(
        paths=tuple(one.location.uri for one in found),
        sizes=tuple(one.size for one in found),
        key=join.key,
        image=join.image,
        by=OWN + join.by,
    )
    files.check()
    return files


def digests(questions: Questions, pictures: PictureFiles | None) -> dict[str, str]:
    """Of the files by which questions are made, for the fingerprint of a run."""
    named = {"--preset": questions.preset, "--objects": questions.objects}
    out = {}
    for flag, name in named.items():
        if name is not None and Path(name).is_file():
            out[f"{name} (of {flag})"] = file_digest(Path(name))
    if pictures is not None:
        listed = repr(tuple(zip(pictures.paths, pictures.sizes, strict=True)))
        out[PICTURES] = hashlib.sha256(listed.encode()).hexdigest()
    return out
