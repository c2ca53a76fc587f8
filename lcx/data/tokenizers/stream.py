"""Tokens to text as they come: what a token adds depends on its neighbours, and a character may take several.

Legend: n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcx.data.tokenizers.tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode the first bytes of a character to until the others come."""

NEIGHBOURS = 8
"""Tokens of the prompt that the first new ones are decoded with: alone, some tokenizers would drop the space before a word."""


class Stream:
    """The text of tokens that come one at a time, given out as far as it is certain, up to the first of the stop strings.

    `before` are tokens that stand before the first. A few tokens are decoded anew with each that comes, as the text of a token
    depends on its neighbours; how many does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = [int(token) for token in before]
        self._first, self._read, self._begin = 0, len(self._tokens), len(self._tokens)
        self._held = ""
        self.text, self.stopped = "", False

    @property
    def tokens(self) -> np.ndarray:
        """Those that were added, int32."""
        return np.asarray(self._tokens[self._begin :], np.int32)

    def add(self, token: int) -> str:
        """The text that has become certain with `token`."""
        self._tokens.append(token)
        return self._take(self._decoded(), last=False)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        return "" if self.stopped else self._take(self._decoded(last=True), last=True)

    def _decoded(self, last: bool = False) -> str:
        """The text of the tokens from `_read` on; none while a character is incomplete."""
        before, whole = (
            self._tokenizer.decode(np.asarray(self._tokens[self._first : end], np.int32)) for end in (self._read, None)
        )
        if not last and (whole.endswith(UNFINISHED) or len(whole) <= len(before)):
            return ""
        self._first, self._read = self._read, len(self._tokens)
        return whole[len(before) :]

    def _take(self, new: str, last: bool) -> str:
        pending = self._held + new
        found = [at for stop in self._stop if (at := pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            out, self._held = pending[: min(found)], ""
        else:
            keep = 0 if last else self._begun(pending)
            out, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += out
        return out

    def _begun(self, pending: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = min(len(pending), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(pending[-n:]) for stop in self._stop)), 0)


def pieces(tokenizer: Tokenizer, tokens: np.ndarray) -> list[str]:
    """The text that each of the tokens `[n]` adds; a character of several tokens is that of the last, and special ones add none."""
    stream = Stream(tokenizer)
    found = [stream.add(token) for token in tokens]
    if found:
        found[-1] += stream.finish()
    return found
