"""Which value belongs to the key? `#ab=1234` needles in text, and `?ab=1234` queries."""

from __future__ import annotations

from lcx.data.tasks.base import RetrievalTask


class Multikey(RetrievalTask):
    """Several needles, some of them queried."""
