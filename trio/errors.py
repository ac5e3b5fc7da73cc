"""The error that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in arguments, configuration or input.

    The message says what is wrong, where, and how to mend it, in one line; the jobs print it
    without a traceback and exit with code 2.
    """
