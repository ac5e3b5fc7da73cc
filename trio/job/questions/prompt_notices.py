"""Lines on prompts that are not what they seem, said before a run. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pyarrow as pa
from tokenizers import Tokenizer

from trio import bundled
from trio.errors import first_line
from trio.job.images.policy import RowError
from trio.job.input.columns import OWN, Columns
from trio.job.input.manifest import Manifest
from trio.job.input.shard_rows import ShardUnreadable, first_rows
from trio.job.output.output_rows import Source
from trio.job.questions.asking import Asking
from trio.job.resume.hub import NotHere, model_file
from trio.job.settings import Model, Settings

LOOKED_AT = 200
"""Rows of the first shard whose prompts are looked at."""
UNKNOWN = 0.2
"""Share of a prompt's tokens."""


def prompt_notices(
    config: Settings, manifest: Manifest, columns: Columns, asking: Asking | None = None
) -> Iterator[str]:
    """A line for each thing that is odd about the prompts of a run."""
    column = columns.roles.get("prompt")
    if config.input.prompt is not None and column is not None:
        yield f"rows keep their own prompt (column {column!r}); --prompt is for those without"
    prompts = [config.input.prompt] if config.input.prompt else []
    if asking is not None or column is not None:
        prompts = list(dict.fromkeys(_prompts(config, manifest, column, asking)))
    if bundled.is_bundled(config.model.model):
        line = bundled.prompts_notice(prompts)
    else:
        line = _unknown(config.model, prompts)
    if line is not None:
        yield line
    if asking is not None and asking.preset.notice is not None:
        yield f"preset {asking.preset.name}: {asking.preset.notice}"


def _prompts(
    config: Settings, manifest: Manifest, column: str | None, asking: Asking | None
) -> list[str]:
    """Of the first rows; none where they cannot be read, of which the run makes errors."""
    names = [str(column)] if asking is None else list(asking.columns)
    try:
        table = first_rows(manifest.shards[0], names, LOOKED_AT)
        if table is None:
            return []
        table = table.slice(0, config.input.limit)
        if asking is None:
            return list(filter(None, table.column(0).to_pylist()))
        return list(_asked(asking, table.rename_columns([OWN + n for n in table.column_names])))
    except (OSError, ShardUnreadable, KeyError, IndexError, UnicodeDecodeError, pa.ArrowException):
        return []


def _asked(asking: Asking, table: pa.Table) -> Iterator[str]:
    for index in range(table.num_rows):
        source = Source(key=index, table=table, index=index, path="", picture="")
        try:
            yield from (ask.prompt or "" for ask in asking.asks(source))
        except RowError:
            continue


def _unknown(model: Model, prompts: Sequence[str]) -> str | None:
    """One line where words of a prompt are none to the model."""
    try:
        path = model_file(model, "tokenizer.json")
    except NotHere:  # engines will say more
        return None
    if path is None or not prompts:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
        word = json.loads(path.read_text(encoding="utf-8"))["model"].get("unk_token")
    except Exception as error:  # what the library raises is not documented
        return f"{path}: cannot be read ({first_line(error)}): prompts are not checked"
    unknown = None if word is None else tokenizer.token_to_id(word)
    if unknown is None:  # it spells what it does not know
        return None
    for prompt in prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        if ids and ids.count(unknown) > UNKNOWN * len(ids):
            return (
                f"of the prompt {prompt[:80]!r} the model knows {len(ids) - ids.count(unknown)} of"
                f" {len(ids)} tokens: do not trust its answers"
            )
    return None
