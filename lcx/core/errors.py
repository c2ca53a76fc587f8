"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A wrong input, said in one sentence that names the value and the way out.

    Shells print it without a traceback and exit with status 1; library callers catch it like any other exception.
    """
