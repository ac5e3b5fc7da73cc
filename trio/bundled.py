"""The bundled model by its name, its files, and the prompts that it was trained on. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from trio.errors import UserError

NAME = "demo"
"""Stands for the bundled model, its text tower and the bundled input, wherever these lie."""
_HOME = Path(__file__).parent / "demo"
MODEL = _HOME / "model"
"""The trained model with its processor, as `save_pretrained` wrote it."""
CLIP = _HOME / "clip"
"""A `CLIPModel` with its tokenizer: `MODEL`'s vision tower, unchanged, and a text tower for it."""
SHARD = _HOME / "data" / "heldout.parquet"
"""The bundled input: held-out scenes with prompts and right answers."""

COLORS = ("red", "green", "blue", "yellow", "purple", "white")
PROMPTS = (
    "Describe the image.",
    "How many digits are there?",
    "Which digit is {color}?",
    "What color is the {digit}?",
    "Where is the {digit}?",
    "Is there a {digit}?",
)
"""All that the bundled model was taught to answer, for any of `COLORS` and any digit."""


def is_bundled(model: str | Path) -> bool:
    """Whether this is the bundled model, by its name or by its directory."""
    return str(model) in (NAME, str(MODEL))


def directory_of(model: str, bundled: Path = MODEL) -> str:
    """`model` as it is, but for the bundled one's name the directory where that lies.

    bundled: what the name stands for here.
    """
    return str(bundled) if model == NAME else model


def shadowed() -> str | None:
    """One line where the name is that of a directory here as well, which is not what is taken."""
    if not os.path.isdir(NAME):
        return None
    return f"'{NAME}' is what comes with the package; for the directory here give ./{NAME}"


def write_images(folder: str | Path, count: int = 8) -> list[Path]:
    """Write the first bundled images as JPEG files; returns their paths.

    Raises:
        UserError: they cannot be written there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        written = []
        for name, data in images(count).items():
            written.append(Path(folder) / name)
            written[-1].write_bytes(data)
    except OSError as error:
        raise UserError(f"images cannot be written to {folder}: {error}") from error
    return written


def images(count: int) -> dict[str, bytes]:
    """The first bundled images by their file names, as JPEG."""
    import pyarrow.parquet as pq

    column = pq.read_table(SHARD, columns=["image"]).column("image").to_pylist()
    every = {image["path"]: image["bytes"] for image in column}
    return dict(list(every.items())[:count])


def unknown_prompts(prompts: Iterable[str]) -> list[str]:
    """Those that the bundled model was not taught, each once.

    It reads words: case and white space do not matter, a full stop or question mark does.
    """
    return [prompt for prompt in dict.fromkeys(prompts) if _words(prompt) not in _known()]


def prompts_notice(prompts: Iterable[str]) -> str | None:
    """One line where the bundled model was not taught some of these prompts."""
    unknown = unknown_prompts(prompts)
    if not unknown:
        return None
    others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return (
        f"the bundled model was not taught the prompt {unknown[0][:80]!r}{others}: do not trust its"
        f" answer. It knows these: {' '.join(PROMPTS)} (color: {', '.join(COLORS)}; digit: 0-9)"
    )


@cache
def _known() -> frozenset[tuple[int, ...]]:
    def filled(prompt: str) -> Iterator[str]:
        for color in COLORS if "{color}" in prompt else ("",):
            for digit in range(10) if "{digit}" in prompt else (0,):
                yield prompt.format(color=color, digit=digit)

    return frozenset(_words(text) for prompt in PROMPTS for text in filled(prompt))


def _words(prompt: str) -> tuple[int, ...]:
    """A prompt as the model's tokenizer reads it."""
    return tuple(_tokenizer().encode(prompt, add_special_tokens=False).ids)


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))
