"""Each rule of each filter against hand-made documents at its threshold and just beyond it."""

import dataclasses

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.curation import document as documents
from lcx.data.curation import settings, words
from lcx.data.curation.config import PRESETS, CuratedSource, CurationConfig, curated
from lcx.data.curation.document import Document
from lcx.data.curation.filters import FILTERS, verdict

OFF = {
    "length": settings.LengthSettings(min_bytes=None),
    "gopher_quality": settings.GopherQualitySettings(*[None] * 9),
    "gopher_repetition": settings.GopherRepetitionSettings(*[None] * 6),
    "fineweb": settings.FineWebSettings(None, None, 30, None, None),
    "c4": settings.C4Settings(None, None, False, False, False, False, False),
}
"""Each filter with all rules left out."""


def reasons(name, text, **rules):
    """All reasons that a filter gives with only some rules on."""
    data = text if isinstance(text, bytes) else text.encode()
    return list(FILTERS[name](dataclasses.replace(OFF[name], **rules), Document("d", data)))


def published(name, rule):
    """The default of one rule."""
    return {rule: getattr(getattr(settings.FilterSettings(), name), rule)}


def lines(*counted):
    return "\n".join(line for line, count in counted for _ in range(count))


def distinct(count, length=4):
    """Different words of letters, all of one length."""
    return [np.base_repr(36 ** (length - 1) * 10 + i, 36).lower() for i in range(count)]


AROUND = {
    "words, fewest": ("gopher_quality", "min_words", "w " * 50, "w " * 49, "too_few_words"),
    "words, most": ("gopher_quality", "max_words", "w " * 100_000, "w " * 100_001, "too_many_words"),
    "symbols are no words": ("gopher_quality", "min_words", "w " * 50, "w " * 49 + "* - + &", "too_few_words"),
    "mean length, least": ("gopher_quality", "min_mean_word_length", "ab cde fghi", "ab cd fghi", "words_too_short"),
    "mean length, most": (
        "gopher_quality",
        "max_mean_word_length",
        "a" * 9 + " " + "b" * 11,
        "a" * 9 + " " + "b" * 12,
        "words_too_long",
    ),
    "punctuation has no length": ("gopher_quality", "max_mean_word_length", '"' + "a" * 10 + '!?!"', "a" * 11, "words_too_long"),
    "hash signs": ("gopher_quality", "max_symbol_ratio", "#a " + "w " * 9, "#a #b " + "w " * 8, "too_many_hash_signs"),
    "ellipses": ("gopher_quality", "max_symbol_ratio", "so... " + "w " * 9, "so… but... " + "w " * 8, "too_many_ellipses"),
    "bullets": (
        "gopher_quality",
        "max_bullet_lines",
        lines(("- a", 9), ("b", 1)),
        lines(("• a", 10)),
        "too_many_bullet_lines",
    ),
    "ellipsis lines": (
        *("gopher_quality", "max_ellipsis_lines", lines(("a...", 3), ("b", 7)), lines(("a…", 4), ("b", 6))),
        "too_many_ellipsis_lines",
    ),
    "alphabetic": ("gopher_quality", "min_alphabetic_words", "w " * 8 + "1 2", "w " * 79 + "1 " * 21, "too_few_alphabetic_words"),
    "duplicate lines": (
        *("gopher_repetition", "max_duplicate_lines", lines(("a", 4), *((f"b{i}", 1) for i in range(6)))),
        *(lines(("a", 5), *((f"b{i}", 1) for i in range(5))), "duplicate_lines"),
    ),
    "duplicate paragraphs": (
        *("gopher_repetition", "max_duplicate_paragraphs", "\n\n".join(["a"] * 4 + distinct(6))),
        *("\n\n\n".join(["a"] * 5 + distinct(5)), "duplicate_paragraphs"),
    ),
    "duplicate paragraphs, line ends of Windows": (
        *("gopher_repetition", "max_duplicate_paragraphs", "\r\n\r\n".join(["a"] * 4 + distinct(6))),
        *("\r\n\r\n".join(["a"] * 5 + distinct(5)), "duplicate_paragraphs"),
    ),
    # 100 characters, of which 20 or 21 are in a second line or paragraph like the first.
    "duplicate line characters": (
        *("gopher_repetition", "max_duplicate_line_chars", f"{'a' * 20}\n{'a' * 20}\n{'b' * 58}"),
        *(f"{'a' * 21}\n{'a' * 21}\n{'b' * 56}", "duplicate_line_chars"),
    ),
    "duplicate paragraph characters": (
        *("gopher_repetition", "max_duplicate_paragraph_chars", f"{'a' * 20}\n\n{'a' * 20}\n\n{'b' * 56}"),
        *(f"{'a' * 21}\n\n{'a' * 21}\n\n{'b' * 54}", "duplicate_paragraph_chars"),
    ),
    "punctuated lines": (
        *("fineweb", "min_punctuated_lines", lines(("It is.", 12), ("menu", 88)), lines(('"It is!"', 11), ("menu", 89))),
        "too_few_punctuated_lines",
    ),
    "short lines": (
        "fineweb",
        "max_short_lines",
        lines(("a" * 29, 67), ("b" * 30, 33)),
        lines(("a" * 29, 68), ("b" * 30, 32)),
        "too_many_short_lines",
    ),
    "repeated line characters": (
        *("fineweb", "max_duplicate_line_chars", f"{'a' * 5}\n{'a' * 5}\n{'b' * 490}"),
        *(f"{'a' * 6}\n{'a' * 6}\n{'b' * 488}", "duplicate_line_chars"),
    ),
    "newlines": ("fineweb", "max_newlines_per_word", "w w w w w w w\nw\nw\nw", "w w w w w w\nw\nw\nw\nw", "too_many_newlines"),
    "sentences": ("c4", "min_sentences", "One. Two! Three? Four. Five.", "One. Two! Three? Four.", "too_few_sentences"),
    "curly brackets": ("c4", "curly_brackets", "a (b) [c]", "a {b}", "curly_bracket"),
    "lorem ipsum": ("c4", "lorem_ipsum", "Lorem, ipsum", "A Lorem IPSUM text", "lorem_ipsum"),
}


@pytest.mark.parametrize("case", AROUND.values(), ids=AROUND)
def test_a_rule_keeps_what_is_at_its_threshold_and_drops_what_is_beyond(case):
    name, rule, kept, dropped, reason = case
    assert reasons(name, kept, **published(name, rule)) == []
    assert reasons(name, dropped, **published(name, rule)) == [reason]


def test_length_in_bytes():
    text = "é" * 10
    assert reasons("length", text, min_bytes=20, max_bytes=20) == []
    assert reasons("length", text, min_bytes=21) == ["too_short"]
    assert reasons("length", text, max_bytes=19) == ["too_long"]


def test_stop_words_are_whole_words_of_any_language():
    rule = {"min_stop_words": 2, "stop_words": settings.STOP_WORDS}
    assert reasons("gopher_quality", "The end. And", **rule) == []
    assert reasons("gopher_quality", "the the other andes", **rule) == ["too_few_stop_words"]
    assert reasons("gopher_quality", "и ДОМ не", min_stop_words=2, stop_words=("и", "не", "на")) == []


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_most_frequent_sequence(n):
    """Words of four letters: 'w w' has 5 n − 1 characters, of which all occurrences count."""
    limit = settings.GopherRepetitionSettings().max_top_ngram[n - 2]
    limits = tuple(limit if k == n else 1.0 for k in (2, 3, 4))
    repeated, count = " ".join(distinct(n)), 10
    marks = [f"m{i:03d}" for i in range(count)]
    core = " ".join(f"{repeated} {mark}" for mark in marks)
    top = count * len(repeated)

    def padded(chars):
        """The text, filled up to so many characters by one long word."""
        return core + " " + "z" * (chars - len(core) - 1)

    enough = int(np.ceil(top / limit))
    assert reasons("gopher_repetition", padded(enough), max_top_ngram=limits) == []
    assert reasons("gopher_repetition", padded(enough - 1), max_top_ngram=limits) == [f"top_{n}_gram"]


@pytest.mark.parametrize("n", range(5, 11))
def test_repeated_sequences(n):
    """A sequence of n words twice: its second occurrence counts, with 4 n characters."""
    limit = settings.GopherRepetitionSettings().max_duplicate_ngram[n - 5]
    limits = tuple(limit if k == n else 1.0 for k in range(5, 11))
    repeated = " ".join(distinct(n))
    core = f"{repeated} mark {repeated} "
    enough = int(np.ceil(4 * n / limit))
    assert reasons("gopher_repetition", core + "z" * (enough - len(core)), max_duplicate_ngram=limits) == []
    found = reasons("gopher_repetition", core + "z" * (enough - 1 - len(core)), max_duplicate_ngram=limits)
    assert found == [f"duplicate_{n}_grams"]


def counted_by_hand(tokens):
    """The nine numbers of `repeated_chars`, word by word."""
    found = []
    for n in (2, 3, 4):
        counts = {}
        for i in range(len(tokens) - n + 1):
            counts.setdefault(tuple(tokens[i : i + n]), []).append(i)
        best = max(counts.values(), key=len, default=[])
        found.append(len(best) * len(" ".join(tokens[best[0] : best[0] + n])) if len(best) > 1 else 0)
    for n in range(5, 11):
        seen, covered = set(), set()
        for i in range(len(tokens) - n + 1):
            if tuple(tokens[i : i + n]) in seen:
                covered |= set(range(i, i + n))
            seen.add(tuple(tokens[i : i + n]))
        found.append(sum(len(tokens[i]) for i in covered))
    return found


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 5, 20])
def test_repetition_against_counting_word_by_word(vocabulary):
    rng = np.random.default_rng(vocabulary)
    for length in (0, 1, 2, 5, 9, 10, 11, 60, 300):
        tokens = [f"{'w' * int(i)}{i}" for i in rng.integers(0, vocabulary, length)]
        found = words.split(" ".join(tokens))
        assert documents.repeated_chars(found.hashes, found.lengths).tolist() == counted_by_hand(tokens)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("Too few.", {"min_line_words": 3}),
        ("No end of a sentence", {"line_ends": True}),
        ("It goes on and on...", {"line_ends": True}),
        ("It goes on and on…", {"line_ends": True}),
        ("In brackets (it is.)", {"line_ends": True}),
        ("Please turn on JavaScript now.", {"javascript": True}),
        ("Read our Privacy Policy here.", {"policies": True}),
        ("This site uses cookies here.", {"policies": True}),
    ],
)
def test_lines_that_c4_removes_hold_no_sentences(line, rule):
    good = "\n".join(["This line is good."] * 4)
    assert reasons("c4", f"{good}\n{line}", min_sentences=5) == []
    assert reasons("c4", f"{good}\n{line}", min_sentences=5, **rule) == ["too_few_sentences"]
    assert reasons("c4", f"{good}\n{line}", min_sentences=4, **rule) == []


@pytest.mark.parametrize("line", ["She said it.", "So “he went,”", 'So "he went,"', "He went 'so'", "これは文です。"])
def test_lines_that_c4_keeps(line):
    assert reasons("c4", "\n".join([line] * 5), min_sentences=5, line_ends=True) == []


def test_a_document_without_lines():
    assert reasons("fineweb", " \n \n", min_punctuated_lines=0.0) == ["no_lines"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't STOP, re-try 3.5!", ["don", "t", "stop", "re", "try", "3", "5"]),
        ("Höhe naïve ÉCOLE", ["höhe", "naïve", "école"]),
        ("東京は 大きい", list("東京は大きい")),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("कख — “x”", ["कख", "x"]),
        ("", []),
        ("—…!", []),
    ],
)
def test_words_of_many_scripts(text, expected):
    found = words.split(text)
    assert found.lengths.tolist() == [len(word) for word in expected]
    alone = [words.split(word.upper()).hashes for word in expected]
    assert found.hashes.tolist() == [one for hashes in alone for one in hashes.tolist()]
    assert len(set(found.hashes.tolist())) == len(set(expected))


def test_hashes_do_not_depend_on_the_place_of_a_word():
    filler = " ".join(distinct(20_000))
    assert words.split(f"{filler} needle").hashes[-1] == words.split("needle").hashes[0]
    long = "x" * 100_000
    assert words.split(f"{filler} {long}").hashes[-1] == words.split(long).hashes[0] != words.split(long + "x").hashes[0]


def test_a_document_in_passages_is_measured_like_one_piece(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [" ".join(f"w{i}é" for i in rng.integers(0, 900, 12)) + "." for _ in range(300)]
    data = "\n".join(dict.fromkeys(rows)).encode()
    whole = Document("d", data)
    expected = whole.counts, whole.lines, whole.digest, np.concatenate(list(whole.word_hashes(0))).tolist()
    monkeypatch.setattr(documents, "PASSAGE_BYTES", 5000)
    cut = Document("d", data)
    assert len(list(cut.passages())) > 4
    assert (cut.counts, cut.lines, cut.digest) == expected[:3]
    assert np.concatenate(list(cut.word_hashes(0))).tolist() == expected[3]
    together = np.concatenate([words.ngrams(hashes, 13) for hashes in cut.word_hashes(12)])
    assert together.tolist() == words.ngrams(np.concatenate(list(whole.word_hashes(0))), 13).tolist()


def test_text_without_white_space_is_cut_between_characters(monkeypatch):
    monkeypatch.setattr(documents, "PASSAGE_BYTES", 1000)
    text = "語" * 5000
    assert "".join(passage.text for passage in Document("d", text.encode()).passages()) == text


def test_the_long_preset_keeps_books_and_code_that_the_published_filters_drop():
    rng = np.random.default_rng(1)
    book = "\n\n".join(" ".join(f"wort{i}" for i in rng.integers(0, 50_000, 60)) + "." for _ in range(2000)).encode()
    code = "".join(f"def f{i}(x{i}):\n    # {i}\n    return {{'a': g{i * 7}}}\n\n\n" for i in range(200)).encode()
    web, long = CuratedSource(), CuratedSource(**settled("long"))
    for text in (book, code):
        assert verdict(web.settings, Document("d", text)) is not None
        assert verdict(long.settings, Document("d", text)) is None
    noise = ("#%x" * 200 + " ").encode() * 100
    assert verdict(long.settings, Document("d", noise)) is not None


def settled(preset):
    built = curated(preset).to_dict()
    types = {
        "length": settings.LengthSettings,
        "gopher_quality": settings.GopherQualitySettings,
        "gopher_repetition": settings.GopherRepetitionSettings,
    }
    return {"filters": tuple(built["filters"]), **{name: cls(**built[name]) for name, cls in types.items()}}


def test_a_preset_is_overridden_rule_by_rule():
    config = curated("long", gopher_quality={"min_words": 7})
    assert config.gopher_quality.min_words == 7 and config.gopher_quality.max_words is None
    assert PRESETS["long"]["gopher_quality"].get("min_words") is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: curated("lang"), "preset='lang' is unknown; did you mean 'long'"),
        (lambda: curated(filters=("gopher",)), "filters='gopher' is unknown; did you mean 'gopher_"),
        (lambda: curated(c4={"min_sentence": 1}), "sources.NAME.c4 has no field 'min_sentence'; did you mean 'min_sentences'"),
        (lambda: curated(source={"kind": "chat", "path": "x"}), "source.kind='chat' is unknown"),
        (lambda: settings.LengthSettings(5, 4), "length.max_bytes=4 is below length.min_bytes=5; raise it"),
        (lambda: settings.FineWebSettings(max_short_lines=67), "fineweb.max_short_lines=67 must be a share from 0 to 1"),
        (lambda: settings.GopherQualitySettings(stop_words=("a",)), "min_stop_words=2 is more than the 1 words"),
        (lambda: CurationConfig(), "config.sources is empty"),
        (lambda: CurationConfig({"a/b": CuratedSource()}), "the name 'a/b', which becomes a folder"),
        (lambda: CurationConfig({"a": CuratedSource(), "b": CuratedSource()}, ("a",)), r"must name each source once \(b\)"),
        (lambda: CurationConfig({"a": CuratedSource()}, ("aa",)), "config.order='aa' is unknown; did you mean 'a'"),
    ],
)
def test_wrong_settings_say_the_way_out(build, message):
    with pytest.raises(UserError, match=message):
        build()
