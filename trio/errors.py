"""Errors that end a job with one line and no traceback, and how others are put into one line."""


class UserError(ValueError):
    """A mistake in arguments, configuration or input.

    The message says what is wrong, where, and how to mend it, in one line; the jobs print it
    without a traceback and exit with code 2.
    """


class JobFailed(RuntimeError):
    """A run cannot go on; what is committed stays, and the same command goes on from there."""


def first_line(error: BaseException, most: int | None = 200) -> str:
    """What an error says, for a message of one line: cut to ``most`` characters, never empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
