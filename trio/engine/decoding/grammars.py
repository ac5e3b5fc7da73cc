"""Regexes and JSON schemas as grammars over a model's tokens, by xgrammar.

That library is loaded when the first of them is asked for. A grammar speaks of text, and its tokens
must therefore spell the text of an answer: see `Grammars`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from trio.engine.decoding.json_schema import exact_schema
from trio.engine.decoding.regexes import translated, translated_pattern
from trio.engine.request import Constraint
from trio.errors import UserError, first_line

SPACE = " ?"
"""What may stand before an answer: it is cut off, and many models begin with it."""
TOGETHER = 64
"""Tokens that are decoded together to see whether they spell text."""


def library() -> Any:
    """xgrammar.

    Raises:
        UserError: it, or what validates JSON, is not installed.
    """
    try:
        import jsonschema  # noqa: F401
        import xgrammar
    except ImportError as error:
        raise UserError(
            f"a regex or JSON schema for answers needs {error.name}: pip install -e '.[structured]'"
        ) from error
    return xgrammar


def grammar_of(constraint: Constraint) -> Any:
    """The library's grammar of what the decoded answer may be, a space before it included.

    Raises:
        UserError: it is wrong, or cannot be followed exactly.
    """
    grammar = library().Grammar
    with refusing(constraint.name):
        if constraint.regex is not None:
            inner = grammar.from_regex(translated(constraint.regex))
        else:
            assert constraint.json_schema is not None
            schema = exact_schema(constraint.json_schema, translated_pattern)
            inner = grammar.from_json_schema(schema, any_whitespace=False, separators=(",", ":"))
        return grammar.concat(grammar.from_regex(SPACE), inner)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns what the library raises, which it does not document, into one line about `what`.

    Raises:
        UserError: instead of anything else.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What the library says, without its time and place."""
    return re.sub(r"^\[[\d:]+\] \S+ (Check failed: \(.*?\) is false: )?", "", first_line(error))


class Grammars:
    """Compiles grammars for a model's tokens.

    `tokenizer`: of transformers. `decode`: as of `Preprocessor`. `size`: of the vocabulary, as the
    model's logits have it. `stop_ids`: the model's own.

    Raises:
        UserError: xgrammar is not installed, or the tokens do not spell the text that they decode
            to, as where every word is a token and spaces are in none.
    """

    def __init__(
        self,
        tokenizer: Any,
        decode: Callable[[Sequence[int]], str],
        *,
        size: int,
        stop_ids: frozenset[int],
        threads: int = 1,
    ) -> None:
        self._texts = token_texts(tokenizer, decode)
        self._size, self._stop_ids, self._threads = size, sorted(stop_ids), threads
        self._compilers: dict[bool, Any] = {}

    def compiled(self, constraint: Constraint) -> Any:
        """What `GrammarWalk` takes.

        Raises:
            UserError: it is wrong, or cannot be followed exactly.
        """
        grammar = grammar_of(constraint)
        with refusing(constraint.name):
            return self._compiler(constraint.json_schema is not None).compile_grammar(grammar)

    def _compiler(self, of_json: bool) -> Any:
        if of_json not in self._compilers:
            texts = self._texts
            if of_json:  # where a control character is written as an escape
                texts = [b"" if any(byte < 32 for byte in text) else text for text in texts]
            xgrammar = library()
            info = xgrammar.TokenizerInfo(
                (texts + [b""] * self._size)[: self._size],
                xgrammar.VocabType.RAW,
                vocab_size=self._size,
                stop_token_ids=self._stop_ids,
            )
            self._compilers[of_json] = xgrammar.GrammarCompiler(
                info, max_threads=self._threads, cache_enabled=False
            )
        return self._compilers[of_json]


class GrammarWalk:
    """How far an answer is through a grammar; one mask is written per token.

    `compiled`: of `Grammars`. `stop_ids`: what ends this answer.
    """

    def __init__(self, compiled: Any, stop_ids: Sequence[int]) -> None:
        self._matcher = library().GrammarMatcher(compiled, override_stop_tokens=list(stop_ids))

    @property
    def is_whole(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_completed())

    def take(self, token: int) -> bool:
        """The next token, no stop token; whether it may come."""
        return bool(self._matcher.accept_token(token))

    def mask(self, words_GW: Any, row: int) -> None:
        """Write which tokens may come next: bit t % 32 of word t // 32; stop tokens are any."""
        if not self._matcher.fill_next_token_bitmask(words_GW, row):
            words_GW[row] = -1


def token_texts(tokenizer: Any, decode: Callable[[Sequence[int]], str]) -> list[bytes]:
    """What each token adds to a text by the library's reckoning; nothing, of control tokens.

    Args:
        tokenizer: of transformers.
        decode: token ids to text without control tokens.

    Raises:
        UserError: tokens decode to another text than that, or the library does not know their
            kind.
    """
    info = library().TokenizerInfo
    with refusing("the model's tokenizer, for a regex or JSON schema"):
        texts = list(info.from_huggingface(tokenizer, stop_token_ids=[0]).decoded_vocab)
    special = {token for token, one in tokenizer.added_tokens_decoder.items() if one.special}
    for token in special.union(tokenizer.all_special_ids):
        texts[token] = b""
    trouble = misspelt(texts, decode)
    if trouble is not None:
        raise UserError(
            "a regex or JSON schema for answers needs a tokenizer whose tokens spell the text;"
            f" this model's do not: {trouble}. Give choices instead"
        )
    return texts


def misspelt(texts: Sequence[bytes], decode: Callable[[Sequence[int]], str]) -> str | None:
    """Tokens that decode to another text than their own, in a few words; None where none do.

    All whose bytes are text are looked at once, among others, but for white space at the ends.
    """
    tokens = [token for token, text in enumerate(texts) if text and _is_text(text)]
    if not tokens:
        return "no token is text"
    groups = [tokens[start : start + TOGETHER] for start in range(0, len(tokens), TOGETHER)]
    for some in (*groups, _spaced(texts, tokens)):
        if decode(some).strip() != _spelt(texts, some):
            pairs = (pair for pair in pairwise(some) if decode(pair).strip() != _spelt(texts, pair))
            shown = next(pairs, tuple(some))
            parts = " and ".join(repr(texts[token].decode()) for token in shown[:2])
            return f"{parts} together are {decode(shown)!r:.60}"
    return None


def _spaced(texts: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
    """Single letters and marks with a space before each, which some decoding takes out."""
    if b" " not in texts:
        return []
    space = texts.index(b" ")
    return [one for token in tokens if len(texts[token]) == 1 for one in (space, token)]


def _spelt(texts: Sequence[bytes], tokens: Sequence[int]) -> str:
    return b"".join(texts[token] for token in tokens).decode().strip()


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def invalidity(json_schema: str, text: str) -> str | None:
    """Why a whole answer is not valid by a JSON schema; None where it is."""
    from jsonschema.validators import validator_for

    schema = json.loads(json_schema)
    try:
        found = json.loads(text)
        wrong = next(validator_for(schema)(schema).iter_errors(found), None)
    except (ValueError, RecursionError) as error:  # what is nested too deeply is neither
        return first_line(error)
    return None if wrong is None else wrong.message
