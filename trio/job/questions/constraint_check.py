"""The constraint of a run's answers, looked at before Ray starts. No torch, but for grammars."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from trio.engine.request import Constraint
from trio.errors import UserError, explaining
from trio.job.resume.hub import NotHere, model_file
from trio.job.settings import Settings


def constrained(config: Settings) -> Settings:
    """The settings with what the sampling of all rows must keep to.

    Raises:
        UserError: a file cannot be read.
    """
    sampling = dataclasses.replace(config.sampling, constraint=config.structured.constraint())
    return dataclasses.replace(config, sampling=sampling)


def schema_digest(config: Settings) -> dict[str, str]:
    """Of a JSON schema's content, for the fingerprint of a run."""
    constraint = config.sampling.constraint
    if constraint is None or constraint.json_schema is None:
        return {}
    digest = hashlib.sha256(constraint.json_schema.encode()).hexdigest()
    return {f"{config.structured.json_schema} (of --json-schema)": digest}


def check_constraint(config: Settings) -> None:
    """What engines would say as well, before any starts, where the model's tokenizer is at hand.

    Raises:
        UserError: a bad regex or schema, or one that this model cannot be held to.
    """
    constraint = config.sampling.constraint
    if constraint is None:
        return
    if not constraint.choices:
        from trio.engine.decoding.grammars import grammar_of

        grammar_of(constraint)
    try:
        path = model_file(config.model, "tokenizer.json")
        model_file(config.model, "tokenizer_config.json")  # beside it
    except NotHere:
        return
    if path is not None:
        with explaining(str(path)):
            _check_tokens(constraint, path)


def _check_tokens(constraint: Constraint, path: Path) -> None:
    tokenizer = _tokenizer(path)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    if not constraint.choices:
        from trio.engine.decoding.grammars import token_texts

        token_texts(tokenizer, decode)
        return
    added = {one.content for one in tokenizer.added_tokens_decoder.values()}
    for choice in constraint.choices:
        if any(one in choice for one in added - {tokenizer.unk_token}):
            continue  # engines spell it out where it is a control token
        ids = tokenizer.encode(choice, add_special_tokens=False)
        if (found := decode(ids).strip()) != choice:
            raise UserError(
                f"--choices: the model's tokens write {found!r:.60} for {choice!r:.60}; give what"
                " they can write"
            )


def _tokenizer(path: Path) -> Any:
    """Of a tokenizer.json; as engines have it, where its configuration lies beside."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(path.parent, "tokenizer_config.json").is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    return AutoTokenizer.from_pretrained(
        path.parent, local_files_only=True, trust_remote_code=False
    )
