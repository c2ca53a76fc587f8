"""MRCR and Graphwalks (OpenAI, 2025)."""

from __future__ import annotations

import functools
import json

from lcx.evals.readers import scores
from lcx.evals.readers.files import Files, Question, Row
from lcx.evals.text.formats import Sample


def mrcr(row: Row) -> Question:
    """A row: `prompt` (messages, as JSON or a list), `answer` and `random_string_to_prepend`."""
    messages = json.loads(row["prompt"]) if isinstance(row["prompt"], str) else row["prompt"]
    references = (row["random_string_to_prepend"], row["answer"])
    *before, last = [message["content"] for message in messages]
    # Twice as long as the answer at four characters a token.
    new_tokens = 64 + len(row["answer"]) // 2
    scored = functools.partial(scores.repeated_turn, references=references)
    return Question(Sample(last, "", references, turns=tuple(before)), new_tokens, scored, answer=row["answer"])


def graphwalks(row: Row) -> Question:
    """A row: `prompt` and `answer_nodes`."""
    nodes = tuple(row["answer_nodes"])
    scored = functools.partial(scores.final_list_f1, references=nodes)
    return Question(Sample(row["prompt"], "", nodes), 256 + 16 * len(nodes), scored)


MRCR = {"all": Files(("*.parquet",), mrcr)}
GRAPHWALKS = {"all": Files(("*.parquet",), graphwalks)}
