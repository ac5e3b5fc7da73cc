"""Errors that end a job with one line and no traceback."""


class UserError(ValueError):
    """A mistake in arguments, configuration or input.

    The message says what is wrong, where, and how to mend it, in one line; the jobs print it
    without a traceback and exit with code 2.
    """


class JobFailed(RuntimeError):
    """A run cannot go on; what is committed stays, and the same command goes on from there."""
