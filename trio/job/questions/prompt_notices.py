"""Lines on prompts that are not what they seem, said before a run. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
from tokenizers import Tokenizer

from trio import bundled
from trio.errors import first_line
from trio.job.images.policy import RowError
from trio.job.input.columns import OWN, Columns
from trio.job.input.manifest import Manifest
from trio.job.input.shard_rows import ShardUnreadable, first_rows
from trio.job.output.output_rows import Source, prompts_of
from trio.job.questions.asking import Asking
from trio.job.resume.hub import NotHere, model_file
from trio.job.settings import Model, Settings
from trio.vqa.presets.prompt_template import PromptTemplate
from trio.vqa.presets.row_values import column_of

LOOKED_AT = 200
"""Rows of the first shard whose prompts are looked at."""
UNKNOWN = 0.2
"""Share of a prompt's tokens."""


def prompt_notices(
    config: Settings, manifest: Manifest, columns: Columns, asking: Asking | None = None
) -> Iterator[str]:
    """A line for each thing that is odd about the prompts of a run."""
    column, text = columns.roles.get("prompt"), config.input.prompt_template
    if config.input.prompt and column is not None:
        yield f"rows keep their own prompt (column {column!r}); --prompt is for those without"
    template = None if text is None or asking is not None else PromptTemplate(text)
    prompts = list(config.input.prompt)
    roles = _roles(columns, asking, template)
    if roles:
        table = _first_rows(config, manifest, roles)
        prompts = list(dict.fromkeys(_prompts(table, asking, template)))
    if bundled.is_bundled(config.model.model):
        line = bundled.prompts_notice(prompts)
    else:
        line = _unknown(config.model, prompts)
    if line is not None:
        yield line
    if asking is not None and asking.preset.notice is not None:
        yield f"preset {asking.preset.name}: {asking.preset.notice}"


def _roles(
    columns: Columns, asking: Asking | None, template: PromptTemplate | None
) -> dict[str, str]:
    """Of the columns that prompts are made of."""
    if asking is not None:
        return {OWN + name: name for name in asking.columns}
    own = {role: name for role, name in columns.roles.items() if role[0] == OWN}
    if template is not None:
        names = {column_of(path, own.values()) for path in template.fields}
        return {role: name for role, name in own.items() if name in names}
    return {"prompt": columns.roles["prompt"]} if "prompt" in columns.roles else {}


def _first_rows(config: Settings, manifest: Manifest, roles: Mapping[str, str]) -> pa.Table:
    """Some of the first shard; none where they cannot be read, of which the run makes errors."""
    names = set(roles.values())
    try:
        found = first_rows(manifest.shards[0], names, LOOKED_AT)
    except (OSError, ShardUnreadable, IndexError, pa.ArrowException):
        found = None
    if found is None:
        return pa.table({})
    there = {role: name for role, name in roles.items() if name in found.column_names}
    table = pa.table({role: found.column(name) for role, name in there.items()})
    return table.slice(0, config.input.limit)


def _prompts(
    table: pa.Table, asking: Asking | None, template: PromptTemplate | None
) -> Iterator[str]:
    for index in range(table.num_rows):
        source = Source(key=index, table=table, index=index, path="", picture="")
        try:
            if asking is not None:
                yield from (ask.prompt or "" for ask in asking.asks(source))
            else:
                yield from filter(None, prompts_of(source, template))
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
