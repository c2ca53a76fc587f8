"""Scores of answers that stand somewhere in a longer text, from which L-Eval and OOLONG take them by rules of their own.

Every function takes a prediction and the references of a question, and returns a score from 0 to 1.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

from lcx.evals.text.matching import near, whole


# ---- L-Eval
def exam_match(prediction: str, references: Sequence[str]) -> float:
    """1 if prediction and reference are the same number, or else the reference stands in it, but for case and space (L-Eval)."""
    wanted = references[0]
    try:
        return float(float(prediction) == float(wanted))
    except ValueError:
        found, sought = (re.sub(r" ", "", text.lower()) for text in (prediction, wanted))
        return float(sought in found)


def one_option(prediction: str, references: Sequence[str]) -> float:
    """1 if the first capital from A to D anywhere is the one with which the reference begins (L-Eval's TOEFL and QuALITY).

    Several letters and nothing else are wrong.
    """
    found = re.fullmatch(r"[A-D]+", prediction) or re.search(r"[A-D]", prediction)
    wanted = re.sub(r"[^A-D]", "", references[0].split()[0])
    return float(found is not None and found[0] == wanted)


def options(prediction: str, references: Sequence[str]) -> float:
    """1 for all right letters and no other, a quarter for some of them and no other (L-Eval's Coursera).

    Letters are those that the prediction begins with, if several; else capitals before space, a full stop or a closing bracket, up
    to the word "Question"; else the first run of letters.
    """
    text = prediction.strip()
    rest = text.lstrip("ABCD")
    leading = text[: len(text) - len(rest)]
    found = set(leading)
    if len(leading) <= 1:
        rest = rest.split("Question")[0]
        found |= set(re.findall(r"[A-D](?=[\s.)])", rest))
        if not found and (run := re.search(r"[A-D]+", rest)):
            found = set(run[0])
    wanted = set(re.sub(r"[^A-D]", "", references[0].split()[0]))
    return 1.0 if found == wanted else 0.25 if found and found < wanted else 0.0


def solved_number(prediction: str, references: Sequence[str]) -> float:
    """1 if the digits behind "The answer is", or else of the first paragraph's last word that has any, are right (L-Eval's GSM).

    Digits count up to a decimal point.
    """

    def digits(text: str) -> str:
        if told := re.search(r"The answer is (\S+)", text):
            word = told[1]
        else:
            word = next((word for word in reversed(text.split("\n\n")[0].split()) if re.search(r"\d", word)), "")
        return re.sub(r"\D", "", word.split(".")[0])

    found, wanted = digits(prediction), digits(references[0])
    return float(bool(found) and whole(found) == int(wanted))


def code_output(prediction: str, references: Sequence[str]) -> float:
    """`exam_match` of the last words, three more than the reference has, or the first after "the final output" (L-Eval's CodeU)."""

    def plain(text: str) -> str:
        text = re.sub(r"\s+", " ", text)
        text = re.sub(r"[,'\\]|\.0", "", text)
        return re.sub(r"(?<=\[) (?=\[)|(?<=\]) (?=[\[\]])", "", text)

    said = re.sub(r"\b(will be|of the code|would be|is|the value of|the result of|printed)\b", "", plain(prediction))
    many = len(references[0].split()) + 3
    before, mark, after = said.rpartition("the final output")
    words = after.split()[:many] if mark else said.split()[-many:]
    return exam_match(" ".join(words), [plain(references[0])])


def judged_twice(prediction: str, references: Sequence[str]) -> float:
    """Half for each right judgement, by the text and behind "[fact:" by what is so (L-Eval's science fiction)."""

    def judgements(text: str) -> list[str | None]:
        by_text, _, by_fact = text.lower().partition("[fact:")
        found = (re.search(r"true|false", part) for part in (by_text, by_fact))
        return [match[0] if match else None for match in found]

    pairs = zip(judgements(prediction), judgements(references[0]), strict=True)
    return sum(found is not None and found == wanted for found, wanted in pairs) / 2


# ---- OOLONG
_COMPARED = ("more common", "less common", "same frequency")
_DATES = ("%Y-%m-%d", "%B %d, %Y", "%b %d, %Y", "%d %B %Y", "%d %b %Y", "%m/%d/%Y", "%Y/%m/%d")


def counted_up(prediction: str, references: Sequence[str], kind: str = "") -> float:
    """1 if what the prediction says last is the reference; else 0.75 to the power of the error of a number (OOLONG-synth).

    Said last is what follows the last colon, without asterisks and square brackets; without a colon, the whole if it is shorter
    than 20 characters, and else its last word. `kind` is the row's `answer_type`: numbers are whole, dates may be written out.
    """
    wanted = references[0]
    if ":" in prediction:
        said = re.sub(r"[*\[\]]", "", prediction.rpartition(":")[2].strip())
    else:
        said = prediction.strip()
        said = said if len(said) < 20 else said.split()[-1]
    if len(said) >= 20:
        said = next((phrase for phrase in _COMPARED if phrase in said), said)
    if said == wanted or (said in _COMPARED and said in wanted):
        return 1.0
    if kind.endswith("NUMERIC"):
        return near(said, wanted)
    return float(kind.endswith("DATE") and _date(said) is not None and _date(said) == _date(wanted))


def _date(text: str) -> datetime.datetime | None:
    for format in _DATES:
        try:
            return datetime.datetime.strptime(text.strip().rstrip("."), format)
        except ValueError:
            continue
    return None


def boxed(prediction: str, references: Sequence[str]) -> float:
    r"""What the first \boxed{} holds, or the whole prediction without one, against the reference (OOLONG-real).

    0.75 to the power of the error for whole numbers; for lists with commas, the share of the reference's elements that are among
    the prediction's; else 1 for the same text, whatever its case.
    """
    found = re.search(r"\\boxed\{(?:\\text\{)?([^{}]*)\}", prediction)
    said, wanted = (found[1] if found else prediction).strip(), references[0].strip()
    kinds = [_kind(text) for text in (said, wanted)]
    if kinds[0] != kinds[1]:
        return 0.0
    if kinds[1] == "number":
        return near(said, wanted)
    if kinds[1] == "list":
        said_parts, parts = ([part.strip() for part in text.split(",") if part.strip()] for text in (said, wanted))
        return len(set(said_parts) & set(parts)) / len(parts) if parts else 0.0
    return float(said.lower() == wanted.lower())


def _kind(text: str) -> str:
    return "number" if re.fullmatch(r"[+-]?\d+", text) else "list" if "," in text else "text"
