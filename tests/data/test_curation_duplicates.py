"""MinHash against its formula, planted near-duplicates, and sequences of words shared with evaluation files."""

import gzip
import json

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.curation import contamination
from lcx.data.curation.document import Document
from lcx.data.curation.duplicates import bucket_keys, first_come, keys_of, signature
from lcx.data.curation.settings import MinHashSettings

FINEWEB = MinHashSettings()
WORDS = np.array([f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"])


def text_of(rng, count):
    return rng.choice(WORDS, count)


def pair_at(jaccard, size, rng):
    """Two sets of `size` numbers with a Jaccard index as near as can be, and that index."""
    shared = round(2 * size * jaccard / (1 + jaccard))
    numbers = rng.integers(0, 1 << 63, 2 * size - shared).astype(np.uint64)
    return numbers[:size], numbers[size - shared :], shared / (2 * size - shared)


@pytest.mark.parametrize("jaccard", [0.3, 0.5, 0.6, 0.7, 0.72, 0.75, 0.8, 0.85, 0.9])
def test_the_share_of_pairs_that_meet_is_that_of_the_formula(jaccard):
    rng, pairs, met, agree, expected, mean = np.random.default_rng(int(jaccard * 100)), 600, 0, 0, 0.0, 0.0
    for _ in range(pairs):
        first, second, s = pair_at(jaccard, 400, rng)
        one, two = signature(first, 112), signature(second, 112)
        agree += np.count_nonzero(one == two)
        met += bool(np.any(keys_of(one, FINEWEB) == keys_of(two, FINEWEB)))
        expected += 1 - (1 - s**8) ** 14
        mean += s
    # Four standard deviations of a count of independent pairs, and of places of their signatures.
    p = expected / pairs
    assert abs(met - expected) <= 4 * np.sqrt(pairs * p * (1 - p)) + 1
    assert abs(agree / 112 - mean) <= 4 * np.sqrt(pairs * jaccard * (1 - jaccard) / 112) + 0.5


def shingles(tokens):
    return {tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)}


def jaccard_of(one, two):
    one, two = shingles(one), shingles(two)
    return len(one & two) / len(one | two)


def near_copy(tokens, changes, rng):
    """The words with some of them replaced."""
    copy = tokens.copy()
    copy[rng.choice(len(tokens), changes, replace=False)] = rng.choice(WORDS, changes)
    return copy


def keys(tokens, settings=FINEWEB):
    return bucket_keys(settings, Document("d", " ".join(tokens).encode()))


@pytest.mark.slow
def test_planted_near_duplicates_are_found_and_others_are_not():
    """The index of pairs is spread evenly over each range; right below a half alone, one in twenty would meet."""
    rng = np.random.default_rng(5)
    met = {"near": [], "far": []}
    for kind, low, high in (("near", 0.85, 0.99), ("far", 0.0, 0.5)):
        while len(met[kind]) < 400:
            tokens, wanted = text_of(rng, int(rng.integers(300, 600))), rng.uniform(low, high)
            lost = 1 - (2 * wanted / (1 + wanted)) ** 0.2
            copy = near_copy(tokens, max(1, round(len(tokens) * lost)), rng)
            if low <= jaccard_of(tokens, copy) < high:
                met[kind].append(bool(np.any(keys(tokens) == keys(copy))))
    assert np.mean(met["near"]) >= 0.99
    assert np.mean(met["far"]) <= 0.01


def test_case_punctuation_and_line_breaks_make_no_difference_to_near_duplicates():
    rng = np.random.default_rng(6)
    tokens = text_of(rng, 300)
    plain = keys(tokens)
    loud = bucket_keys(FINEWEB, Document("d", (", ".join(tokens).upper() + "!\n").encode()))
    assert (plain == loud).all()
    assert not (plain == keys(text_of(rng, 300))).any()


def test_texts_of_fewer_words_than_a_shingle_are_compared_whole():
    assert (keys(["one", "two"]) == keys(["ONE", "two"])).all()
    assert not (keys(["one", "two"]) == keys(["two", "one"])).any()
    assert bucket_keys(FINEWEB, Document("d", b"-- !!")) is None


def duplicates(columns, candidates):
    """Duplicate -> the document it duplicates."""
    found = first_come(columns, candidates)
    assert found.shape == candidates.shape
    return {i: int(first) for i, first in enumerate(found) if first >= 0}


def columns(*rows):
    return np.array(rows, np.uint64).T


def test_the_first_of_several_duplicates_stays():
    all_in = np.ones(5, bool)
    assert duplicates(columns([7], [8], [7], [7], [8]), all_in) == {2: 0, 3: 0, 4: 1}
    # 1 is like 0 and 2 is like 1, but 2 is not like 0: as 1 is dropped, 2 stays, and 3, which is like 2, is dropped.
    assert duplicates(columns([1, 2], [1, 3], [4, 3], [4, 9], [5, 8]), all_in) == {1: 0, 3: 2}
    assert duplicates(columns([7], [8], [7], [7], [8]), np.array([False, True, True, True, True])) == {3: 2, 4: 1}
    assert duplicates(columns([1], [2]), np.ones(2, bool)) == {}
    assert duplicates([np.zeros(0, np.uint64)], np.zeros(0, bool)) == {}


def test_the_first_stays_like_in_a_loop_over_all_pairs():
    rng = np.random.default_rng(7)
    table = rng.integers(0, 60, (80, 3)).astype(np.uint64)
    stay, expected = [], {}
    for i in range(80):
        like = [j for j in stay if (table[i] == table[j]).any()]
        if like:
            expected[i] = like[0]
        else:
            stay.append(i)
    assert expected and duplicates(table.T, np.ones(80, bool)) == expected


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("Some text\n of words", "some  TEXT of words\n", True),
        ("Some text", "Some, text", False),
        ("Größe", "GRÖße", True),
        ("a b", "ab", False),
        ("", " \n", True),
        ("x" * 40_000 + " y", "X" * 40_000 + "\ty", True),
    ],
)
def test_digests_ignore_white_space_and_case_alone(one, two, same):
    assert (Document("a", one.encode()).digest == Document("b", two.encode()).digest) is same


def evaluation_files(folder, items):
    (folder / "a.json").write_text(json.dumps({"rows": [{"question": items[0], "n": 1}, [items[1]]]}))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"q": {"text": item}}) for item in items[2:4]).encode()))
    (folder / "c.txt").write_text(items[4])
    return contamination.collect((f"{folder}/*.js*", f"{folder}/c.txt"), 13)


def test_every_planted_sequence_is_found_and_nothing_else(tmp_path):
    rng = np.random.default_rng(8)
    items = [" ".join(text_of(rng, count)) for count in (13, 40, 60, 25, 200)]
    forbidden = evaluation_files(tmp_path, items)
    assert (forbidden.texts, forbidden.short) == (5, 0)
    assert len(forbidden.keys) == 1 + 28 + 48 + 13 + 188
    forbidden.save(tmp_path / "forbidden.npz")
    forbidden = contamination.load(tmp_path / "forbidden.npz")
    for item in items:
        tokens = item.split()
        for _ in range(40):
            at = int(rng.integers(0, len(tokens) - 12))
            place, body = int(rng.integers(0, 301)), text_of(rng, 300).tolist()
            whole = body[:place] + [one.upper() + "," for one in tokens[at : at + 13]] + body[place:]
            assert forbidden.matches(Document("d", " ".join(whole).encode()), 1)
            part = body[:place] + tokens[at : at + 12] + body[place:]
            assert not forbidden.matches(Document("d", " ".join(part).encode()), 1)


def test_several_matches_may_be_asked_for(tmp_path):
    rng = np.random.default_rng(9)
    (tmp_path / "a.txt").write_text(" ".join(tokens := text_of(rng, 30)))
    forbidden = contamination.collect((f"{tmp_path}/a.txt",), 13)
    document = Document("d", " ".join(["x", *tokens[:15], "y"]).encode())
    assert forbidden.matches(document, 3) and not forbidden.matches(document, 4)


def test_short_texts_are_counted_as_such(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "one two three"}\n{"q": ""}\n')
    forbidden = contamination.collect((f"{tmp_path}/a.jsonl",), 13)
    assert (forbidden.texts, forbidden.short, len(forbidden.keys)) == (2, 2, 0)
    assert not forbidden.matches(Document("d", b"one two three " * 9), 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": ', "evaluation file .*a.jsonl cannot be read"),
        ("a.txt", b"\xff\xfe", "evaluation file .*a.txt cannot be read"),
        ("a.json.gz", b"no", "a.json.gz cannot be read"),
        ("b.txt", b"", "matches no file; name the evaluation's files"),
    ],
)
def test_an_evaluation_file_that_cannot_be_read_ends_the_run(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        contamination.collect((f"{tmp_path}/a.*",), 13)
