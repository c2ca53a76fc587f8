"""What a model is asked to write.

The styles follow those of WRAP (arXiv:2401.16380), which rewrites web pages in a few fixed manners; the words are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

STYLES = {
    "plain": "in plain words and short, clear sentences",
    "encyclopaedic": "in the neutral, precise tone of an encyclopaedia, in full sentences",
    "textbook": "as a textbook would explain it, step by step, each term defined where it first occurs",
    "dialogue": "as a conversation between somebody who asks and somebody who knows, each turn on a line of its own",
}
"""Name -> how to write."""

_REPHRASE = """Rewrite the passage below {style}. Keep every fact, name and number and the order in which they come, add \
nothing, and stay near the length of the passage. Write in the language of the passage. Answer with the rewritten passage alone.

Passage:
{text}"""

_QUESTIONS = """Below are {count} passages that stand far apart in one long document. Write one question that only a reader of \
all of them can answer, and its answer in one to three sentences. Other readers have the whole document and do not know which \
passages were picked: call people and things by name, never speak of passages, and do not give the answer away in the question. \
Write in the language of the document. Answer with JSON alone: {"question": "...", "answer": "..."}

{passages}"""


def rephrase(text: str, style: str, own: str = "") -> str:
    """The request to rewrite a passage in a style of `STYLES`, or the user's own one with the passage in it."""
    # Not `format`: passages and prompts may hold braces.
    return (own or _REPHRASE.replace("{style}", STYLES[style])).replace("{text}", text)


def question(passages: Sequence[str], own: str = "") -> str:
    """The request for a question about all passages and its answer."""
    shown = "\n\n".join(f"Passage {i}:\n{text}" for i, text in enumerate(passages, 1))
    return (own or _QUESTIONS.replace("{count}", str(len(passages)))).replace("{passages}", shown)
