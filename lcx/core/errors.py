"""The exception for errors that the user can fix."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping


class UserError(Exception):
    """An invalid input, described in one sentence that names the value and how to fix it.

    Commands print it without a traceback and exit with status 1; library callers catch it like any other exception.
    """


@contextlib.contextmanager
def naming(settings: Mapping[str, str]) -> Iterator[None]:
    """Errors raised inside call each setting (a key such as `evals.lengths`) what the user has called it (`--lengths`).

    A key that ends in `=` is renamed only where a value follows, for those that are words of English, too.
    """
    try:
        yield
    except UserError as error:
        text = renamed = str(error)
        for key, name in settings.items():
            follows = "" if key.endswith("=") else r"(?!\w|\.\w)"
            renamed = re.sub(rf"(?<![\w.-]){re.escape(key)}{follows}", name, renamed)
        if renamed == text:
            raise
        raise UserError(renamed) from error
