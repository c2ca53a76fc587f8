"""A curated document as a line of JSONL."""

from __future__ import annotations

import json
from typing import Any

from lcx.data.curation.document import PASSAGE_BYTES


def row(source: str, name: str, text: bytes, **more: Any) -> bytes:
    """The line: `name`, `source`, `bytes` of the text, whatever `more` there is, and `text` last; ends in a line break.

    The text is escaped in parts, because copies of a long one would be many.
    """
    head = json.dumps({"name": name, "source": source, "bytes": len(text), **more}, ensure_ascii=False)
    parts, at = [head[:-1].encode("utf-8", "replace"), b', "text": "'], 0
    while at < len(text):
        end = min(len(text), at + PASSAGE_BYTES)
        while end < len(text) and text[end] & 0xC0 == 0x80:
            end -= 1
        parts.append(json.dumps(text[at:end].decode(), ensure_ascii=False)[1:-1].encode())
        at = end
    return b"".join([*parts, b'"}\n'])
