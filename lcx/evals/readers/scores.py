"""How published benchmarks score answers in words, written anew from their descriptions.

Every function takes a prediction and the references of a question, and returns a score from 0 to 1.
"""

from __future__ import annotations

import collections
import difflib
import re
import string
from collections.abc import Sequence

from lcx.core.extras import library


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation, articles and extra space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of words after SQuAD's normalisation; the best of the references."""
    return max(_f1(normalized(prediction).split(), normalized(reference).split()) for reference in references)


def chinese_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of jieba's words, without punctuation; the best of the references. Raises `UserError` without the library."""
    jieba = library("jieba", "a Chinese dataset", "suites")

    def words(text: str) -> list[str]:
        return [word for piece in jieba.cut(text.lower()) if (word := re.sub(r"[\W_]+", "", piece))]

    return max(_f1(words(prediction), words(reference)) for reference in references)


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    same = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after SQuAD's normalisation."""
    return float(normalized(prediction) in {normalized(reference) for reference in references})


def contained(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the prediction, both after SQuAD's normalisation."""
    return float(any(normalized(reference) in normalized(prediction) for reference in references))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F of the longest common subsequence of words; the best of the references."""
    return max(_lcs_f(prediction.split(), reference.split()) for reference in references)


def _lcs_f(found: Sequence[str], wanted: Sequence[str]) -> float:
    row = [0] * (len(wanted) + 1)
    for one in found:
        before = row[:]
        for j, other in enumerate(wanted, 1):
            row[j] = before[j - 1] + 1 if one == other else max(before[j], row[j - 1])
    return 2 * row[-1] / (len(found) + len(wanted)) if row[-1] else 0.0


def classification(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """One over the number of classes that the prediction names, if the right one is among them (LongBench).

    Classes whose name is a part of the right one's do not count.
    """

    def of(reference: str) -> float:
        named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
        return 1 / len(named) if reference in named else 0.0

    return max(map(of, references))


def share_of_numbers(prediction: str, references: Sequence[str]) -> float:
    """The share of the prediction's whole numbers that are the reference's first (LongBench's retrieval and count)."""
    found = re.findall(r"\d+", prediction)
    wanted = re.findall(r"\d+", references[0])
    return found.count(wanted[0]) / len(found) if found and wanted else 0.0


def code_similarity(prediction: str, references: Sequence[str]) -> float:
    """Similarity of the first line that is neither a comment nor holds a backtick; the best of the references."""
    lines = [line for line in prediction.lstrip("\n").split("\n") if "`" not in line and "#" not in line and "//" not in line]
    line = lines[0] if lines else ""
    return max(round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100 for reference in references)


def choice_of_four(prediction: str, references: Sequence[str]) -> float:
    """1 if "The correct answer is (X)", or without brackets, names the right letter (LongBench v2); asterisks do not count."""
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return float(bool(found) and found[1] == references[0])


def leading_choice(prediction: str, references: Sequence[str]) -> float:
    """1 if the first letter from A to D that stands alone is the right one, or the prediction begins with the right option."""
    found = re.search(r"\b([A-D])\b", prediction)
    options = references[1:]
    return float(bool(found and found[1] == references[0]) or any(prediction.strip().startswith(text) for text in options))


def repeated_turn(prediction: str, references: Sequence[str]) -> float:
    """0 unless the prediction begins with the first reference; then the similarity of the rest with that of the second (MRCR)."""
    mark, wanted = references
    if not prediction.startswith(mark):
        return 0.0
    return difflib.SequenceMatcher(None, prediction.removeprefix(mark), wanted.removeprefix(mark)).ratio()


def final_list_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the nodes in the last line's "Final Answer: [a, b]" (Graphwalks); two empty lists score 1."""
    last = prediction.strip().split("\n")[-1]
    found = re.search(r"Final Answer: ?\[(.*)\]", last)
    if not found:
        return 0.0
    named = {text.strip() for text in found[1].split(",") if text.strip()}
    if not named and not references:
        return 1.0
    return 2 * len(named & set(references)) / (len(named) + len(references))


def only_label(prediction: str, references: Sequence[str], labels: Sequence[str] = (), question: str = "") -> float:
    """1 if the labels of the first sentence, those of the question left out, are exactly the references (BABILong)."""
    said = re.split(r"\.|<context>|<example>", prediction.lower())[0]
    found = {label.lower() for label in labels if label.lower() in said and label.lower() not in question.lower()}
    wanted = {part.strip().lower() for reference in references for part in reference.split(",")}
    return float(found == wanted)


def first_number(prediction: str, references: Sequence[str]) -> float:
    """1 if the first whole number of the prediction is the reference, as text (InfiniteBench)."""
    found = re.search(r"\d+", prediction)
    return float(bool(found) and found[0] == references[0])


def word_among(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference is one of the prediction's words, punctuation aside (InfiniteBench's pairs)."""
    words = re.split(r"[\s,:\"'.;\[\]{}()]+", prediction)
    return float(any(reference in words for reference in references))


def last_word(prediction: str, references: Sequence[str]) -> float:
    """1 if the last word of the prediction is the reference (InfiniteBench's code)."""
    words = prediction.split()
    return float(bool(words) and words[-1].strip(".") == references[0])


def name_among(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference in capitals is one of the prediction's words in capitals (InfiniteBench's dialogue)."""
    words = re.split(r"[^A-Z']+", prediction.upper())
    return float(any(reference.upper() in words for reference in references))
