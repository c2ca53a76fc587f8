"""How published benchmarks score answers in words, written anew from their descriptions.

Every function takes a prediction and the references of a question, and returns a score from 0 to 1. Those with a library behind
them raise `UserError` without it.
"""

from __future__ import annotations

import collections
import difflib
import re
import string
import unicodedata
from collections.abc import Callable, Sequence

from lcx.core.extras import library
from lcx.evals.text.matching import whole

# ---- words


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation, articles and extra space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of words after SQuAD's normalisation; the best of the references."""
    return max(_f1(normalized(prediction).split(), normalized(reference).split()) for reference in references)


def folded_f1(prediction: str, references: Sequence[str]) -> float:
    """`token_f1` of text whose letters have lost their accents (ZeroSCROLLS)."""

    def folded(text: str) -> str:
        return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))

    return token_f1(folded(prediction), [folded(reference) for reference in references])


def chinese_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of jieba's words, without punctuation; the best of the references (LongBench)."""
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


def named(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the prediction as it is written, capitals included (NoLiMa)."""
    return float(any(reference in prediction for reference in references))


def of_first_line(score: Callable[..., float]) -> Callable[..., float]:
    """A score of a prediction's first line alone, line breaks before it aside."""

    def scored(prediction: str, references: Sequence[str]) -> float:
        return score(prediction.lstrip("\n").split("\n")[0], references)

    return scored


# ---- summaries
def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L as LongBench's library `rouge` 1.0.1 has it; the best of the references.

    2u / (m + n) for m and n different words, of which u stand in the longest common subsequence of any sentence of the prediction
    with any of the reference. A full stop ends a sentence, spaces separate words.
    """
    return max(_rouge_l(prediction, reference) for reference in references)


def _rouge_l(prediction: str, reference: str) -> float:
    found, wanted = ([part.split() or [""] for part in text.split(".") if part] for text in (prediction, reference))
    if not found or not wanted:
        return 0.0
    common = {word for one in wanted for other in found for word in _common_subsequence(one, other)}
    return 2 * len(common) / sum(len({word for sentence in side for word in sentence}) for side in (found, wanted))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> set[str]:
    """Words of the longest common subsequence; of several, the one that is found from the end, giving up words of `other` first."""
    table = [[0] * (len(other) + 1)]
    for word in one:
        row, above = [0], table[-1]
        for j, again in enumerate(other):
            row.append(above[j] + 1 if word == again else max(above[j + 1], row[j]))
        table.append(row)
    words, i, j = set(), len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            words.add(one[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def chinese_rouge_l(prediction: str, references: Sequence[str]) -> float:
    """`rouge_l` of jieba's words (LongBench)."""
    jieba = library("jieba", "a Chinese dataset", "suites")
    prediction, *wanted = (" ".join(jieba.cut(text)) for text in (prediction, *references))
    return rouge_l(prediction, wanted)


def rouge_l_sum(prediction: str, references: Sequence[str]) -> float:
    """F of ROUGE-Lsum by the library rouge-score, lines being sentences; the best of the references (InfiniteBench)."""
    return _rouge(prediction, references, ("rougeLsum",))[0]


def rouge_mean(prediction: str, references: Sequence[str]) -> float:
    """The geometric mean of F of ROUGE-1, -2 and -L by rouge-score, each the best of the references (ZeroSCROLLS, L-Eval)."""
    one, two, longest = _rouge(prediction, references, ("rouge1", "rouge2", "rougeL"))
    return (one * two * longest) ** (1 / 3)


def _rouge(prediction: str, references: Sequence[str], kinds: Sequence[str]) -> list[float]:
    library("rouge_score", "a dataset of summaries", "suites")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(kinds))
    scored = [scorer.score(reference, prediction) for reference in references]
    return [max(score[kind].fmeasure for score in scored) for kind in kinds]


# ---- classes, choices, lists and numbers
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


def first_choice(prediction: str, references: Sequence[str]) -> float:
    """1 if the first letter from A to D that stands alone is the first one of the reference, too (ZeroSCROLLS' QuALITY)."""
    found, wanted = (re.search(r"\b[A-D]\b", text) for text in (prediction, references[0]))
    return float(found is not None and wanted is not None and found[0] == wanted[0])


def initial_choice(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction begins with the letter of the reference, in either case (BAMBOO's questions)."""
    return float(prediction.strip()[:1].lower() == references[0].lower())


def same_text(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is the reference but for case, space and full stops around it (BAMBOO's AltQA)."""
    found, wanted = (text.strip().strip(".").lower() for text in (prediction, references[0]))
    return float(found == wanted)


def yes_or_no(prediction: str, references: Sequence[str]) -> float:
    """1 if "yes" in the first three characters and a reference of "Yes" go together (BAMBOO's hallucinations)."""
    return float(("yes" in prediction.strip()[:3].lower()) == (references[0] == "Yes"))


def yes_metrics(references: Sequence[Sequence[str]], scores: Sequence[float]) -> dict[str, float]:
    """Precision, recall and F1 of "Yes" over questions with `yes_or_no` scores; 0 where there is none (BAMBOO)."""
    wanted = [reference[0] == "Yes" for reference in references]
    right = sum(score == 1 and yes for score, yes in zip(scores, wanted, strict=True))
    # A "No" that is wrong was answered by a yes.
    said = right + sum(score == 0 and not yes for score, yes in zip(scores, wanted, strict=True))
    yes = sum(wanted)
    return {
        "precision": right / said if said else 0.0,
        "recall": right / yes if yes else 0.0,
        "f1": 2 * right / (said + yes) if said + yes else 0.0,
    }


def concordance(prediction: str, references: Sequence[str]) -> float:
    """The share of pairs of references that the prediction's whole numbers have in the same order (BAMBOO's sorting).

    0 if there are not as many numbers as references. Numbers that are counted from 1 are moved to 0.
    """
    found = [whole(number) for number in re.findall(r"\d+", prediction)]
    if len(found) != len(references):
        return 0.0
    if found and min(found) == 1:
        found = [number - 1 for number in found]
    wanted = _pairs([int(reference) for reference in references])
    return len(wanted & _pairs(found)) / len(wanted) if wanted else 1.0


def _pairs(numbers: Sequence[int]) -> set[tuple[int, int]]:
    return {(one, other) for i, one in enumerate(numbers) for other in numbers[i + 1 :]}


def concordance_of_permutation(prediction: str, references: Sequence[str]) -> float:
    """The share of pairs of references that the prediction has in the same order; 0 for no permutation (ZeroSCROLLS' BookSumSort).

    Only digits, commas and space count in the prediction; commas separate numbers.
    """
    kept = re.sub(r"[^\d,\s]", "", prediction)
    parts, wanted = [part.strip() for part in kept.strip().strip(",").split(",")], list(map(int, references))
    found = list(map(whole, parts)) if all(part.isdigit() for part in parts) else []
    if sorted(found) != sorted(wanted):
        return 0.0
    pairs = _pairs(wanted)
    return len(pairs & _pairs(found)) / len(pairs) if pairs else 1.0


def near_percentage(prediction: str, references: Sequence[str]) -> float:
    """Half for every ten points that the first percentage is off; 0 without one (ZeroSCROLLS' SpaceDigest)."""
    found, wanted = (re.search(r"(\d+(?:\.\d+)?)\s*%", text) for text in (prediction, references[0]))
    return 2 ** (-abs(float(found[1]) - float(wanted[1])) / 10) if found and wanted else 0.0


def labelled(prediction: str, references: Sequence[str], prefix: str = "label:") -> float:
    """`exact_match` of what follows the prefix on its line, or of the first line without one (HELMET)."""
    found = re.search(rf"{re.escape(prefix)}(.*)", prediction, re.IGNORECASE)
    return exact_match(found[1] if found else prediction.split("\n")[0], references)
