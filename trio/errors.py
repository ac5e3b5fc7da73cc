"""Errors that end a job with one line and no traceback, and how others are put into one line."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in arguments, configuration or input.

    The message says what is wrong, where, and how to mend it, in one line; the jobs print it
    without a traceback and exit with code 2.
    """


class JobFailed(RuntimeError):
    """A run cannot go on; what is committed stays, and the same command goes on from there."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` for a word that is nearly a known one."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException, most: int | None = 200) -> str:
    """What an error says, for a message of one line: cut to ``most`` characters, never empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def kind_and_line(error: BaseException, most: int | None = 200) -> str:
    """``first_line`` behind the error's type, for what no library documents."""
    return f"{type(error).__name__}: {first_line(error, most)}"


@contextmanager
def explaining(
    what: str,
    *,
    cure: str = "",
    look: Callable[[], object] | None = None,
    most: int | None = None,
) -> Iterator[None]:
    """Turn whatever a library raises over broken files, or a user's own module, into one line.

    Args:
        what: is read, as the message begins.
        cure: how it ends, with what parts it from the rest.
        look: at the files one by one; raises a UserError that names the broken one.
        most: characters of what was raised.

    Raises:
        UserError: instead of anything else, which no library documents.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if look is not None:
            look()
        raise UserError(f"{what} cannot be loaded: {kind_and_line(error, most)}{cure}") from error
