"""The constraint of a run's answers, looked at before Ray starts. No torch, but for grammars."""

from __future__ import annotations

import dataclasses
import hashlib
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
    except NotHere:
        return
    if path is not None:
        with explaining(str(path)):
            _check_tokens(constraint, str(path))


def _check_tokens(constraint: Constraint, path: str) -> None:
    from tokenizers import Tokenizer

    if not constraint.choices:
        from transformers import PreTrainedTokenizerFast

        from trio.engine.decoding.grammars import token_texts

        fast: Any = PreTrainedTokenizerFast(tokenizer_file=path)
        token_texts(fast, lambda ids: fast.decode(ids, skip_special_tokens=True))
        return
    tokenizer = Tokenizer.from_file(path)
    for choice in constraint.choices:
        ids = tokenizer.encode(choice, add_special_tokens=False).ids
        if (found := tokenizer.decode(ids).strip()) != choice:
            raise UserError(
                f"--choices: the model's tokens write {found!r:.60} for {choice!r:.60}; give what"
                " they can write"
            )
