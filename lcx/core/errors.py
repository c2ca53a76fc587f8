"""The exception for errors that the user can fix."""


class UserError(Exception):
    """An invalid input, described in one sentence that names the value and how to fix it.

    Commands print it without a traceback and exit with status 1; library callers catch it like any other exception.
    """
