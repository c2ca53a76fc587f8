"""Every row is read back as text, the way that a person would check it."""

import re
import time

import numpy as np
import pytest
import tokenizers as library

from lcx.core.configs import build
from lcx.core.errors import UserError
from lcx.data.sources import sources
from lcx.data.tasks.base import TaskConfig
from lcx.data.tasks.table import TASKS, make_task
from lcx.data.tokenizers import tokenizers

BYTES = tokenizers.load("bytes")


@pytest.fixture(scope="module")
def haystack():
    """Text that is full of what looks like needles and queries."""
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("ab#?=@12 \n"), 60_000)) + "#ab=1234\n?ab=1234\n" * 500
    ids = BYTES.encode(text)
    return sources.Subset(sources.InMemorySource(["h"], [ids], [0], 256), np.arange(1))


def read(task, tokens):
    """(needles {key: value or key}, their starts, queries [(key, value)]) of a row."""
    text = BYTES.decode(tokens)
    k, v = task.config.key_length, task.config.value_length
    found = list(re.finditer(rf"#([a-z]{{{k}}})(=[0-9]{{{v}}}|@[a-z]{{{k}}})\n", text))
    keys = [match[1] for match in found]
    assert len(set(keys)) == len(keys)
    queries = re.findall(rf"\?([a-z]{{{k}}})=([0-9]{{{v}}})\n", text)
    return {match[1]: match[2] for match in found}, {match[1]: match.start() for match in found}, queries


def follow(needles, key):
    """(value, key that held it, hops)."""
    hops = 0
    while needles[key].startswith("@"):
        key, hops = needles[key][1:], hops + 1
    return needles[key][1:], key, hops


CONFIGS = {
    "passkey": TaskConfig(value_length=5),
    "multikey": TaskConfig(needles=6, queries=3),
    "key_value": TaskConfig(queries=2),
    "variable_tracking": TaskConfig(needles=3, queries=2, hops=3),
}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("length", [200, 257, 1000])
def test_rows_are_valid_and_have_one_answer(kind, length, haystack):
    task = make_task(kind, CONFIGS[kind], BYTES)
    samples = task.sample(np.random.default_rng(length), length, haystack, 40)
    present, asked = task.counts(length)
    for row in range(40):
        tokens, weights, answers = samples.tokens[row], samples.loss_weights[row], samples.answers[row]
        assert tokens.shape == (length + 1,)
        needles, starts, queries = read(task, tokens)
        hops = task.config.hops if kind == "variable_tracking" else 0
        assert len(needles) == present * (hops + 1)
        assert len(queries) == asked == len(set(queries))
        for key, value in queries:
            answer, holder, steps = follow(needles, key)
            assert (answer, steps) == (value, hops)
        body = length + 1 - asked * task.line_length
        size = task.line_length
        assert samples.depths[row] == pytest.approx(starts[holder] / (body - size))
        chain = key
        while needles[chain].startswith("@"):
            assert starts[needles[chain][1:]] < starts[chain]
            chain = needles[chain][1:]
        last = slice(samples.answer_start, samples.answer_start + samples.answer_length)
        assert BYTES.decode(tokens[last]) == queries[-1][1]
        assert answers[last].all()
        assert answers.sum() == asked * task.config.value_length
        assert (weights[answers] == task.config.answer_weight).all()
        assert (weights[body:][~answers[body:]] == task.config.query_weight).all()
        lines = np.zeros(length + 1, bool)
        for key, start in starts.items():
            lines[start : start + task.config.key_length + len(needles[key]) + 2] = True
        assert (weights[:body][lines[:body]] == task.config.needle_weight).all()
        assert (weights[:body][~lines[:body]] == task.config.haystack_weight).all()


@pytest.mark.parametrize("kind", ["passkey", "multikey", "key_value"])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_needle_at_the_depth_asked_for(kind, depth, haystack):
    task = make_task(kind, CONFIGS[kind], BYTES)
    for length in (64, 256, 1023):
        counts = {} if kind != "multikey" else {"needles": 3}
        samples = task.sample(np.random.default_rng(3), length, haystack, 20, depth=depth, **counts)
        body = length + 1 - task.line_length
        for tokens, found in zip(samples.tokens, samples.depths, strict=True):
            needles, starts, queries = read(task, tokens)
            assert len(needles) == task.counts(length, counts.get("needles"), 1)[0]
            ((key, value),) = queries
            assert needles[key] == f"={value}"
            assert starts[key] == round(depth * (body - task.line_length))
            assert abs(found - depth) <= 1 / (body - task.line_length)


def test_several_queries_end_with_the_needle_at_the_depth(haystack):
    task = make_task("multikey", TaskConfig(needles=5), BYTES)
    samples = task.sample(np.random.default_rng(0), 256, haystack, 50, depth=0.3, queries=3)
    for tokens in samples.tokens:
        needles, starts, queries = read(task, tokens)
        assert len(set(queries)) == 3
        assert all(needles[key] == f"={value}" for key, value in queries)
        assert starts[queries[-1][0]] == round(0.3 * (257 - 4 * task.line_length))


def test_crowded_rows_at_every_depth(haystack):
    """As full as a row can be: lines on both sides of the fixed one still never overlap."""
    task = make_task("multikey", TaskConfig(needles=5, queries=1), BYTES)
    size = task.line_length
    for length in (6 * size - 1, 6 * size + 7, 7 * size):
        for depth in (0.0, 1.0) if length < 6 * size + 7 else (0.0, 0.05, 0.4, 0.5, 0.9, 1.0):
            try:
                samples = task.sample(np.random.default_rng(0), length, haystack, 30, depth=depth)
            except UserError as error:
                assert "do not fit" in str(error)
                continue
            assert all(len(read(task, tokens)[0]) == 5 for tokens in samples.tokens)


def test_places_and_keys_spread_evenly(haystack):
    task = make_task("multikey", TaskConfig(needles=2, queries=1), BYTES)
    samples = task.sample(np.random.default_rng(0), 512, haystack, 4000)
    counts, _ = np.histogram(samples.depths, bins=8, range=(0, 1))
    assert counts.min() > 0.8 * 500
    first = samples.tokens[:, samples.answer_start - 1 - task.config.key_length]
    letters = np.bincount(first - ord("a"), minlength=26)
    assert letters.min() > 0.6 * 4000 / 26


def test_rows_depend_on_their_own_numbers_alone(haystack):
    task = make_task("multikey", TaskConfig(), BYTES)
    uniforms = np.random.default_rng(5).random((6, task.uniforms(300)))
    together = task.rows(uniforms, 300, haystack)
    alone = task.rows(uniforms[4:5], 300, haystack)
    np.testing.assert_array_equal(together.tokens[4:5], alone.tokens)
    one, two = (task.sample(np.random.default_rng(9), 300, haystack, 3) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert len({tuple(row) for row in one.tokens.tolist()}) == 3


def test_extreme_numbers_stay_in_range(haystack):
    for kind in TASKS:
        task = make_task(kind, CONFIGS[kind], BYTES)
        for extreme in (0.0, np.nextafter(1, 0)):
            uniforms = np.full((1, task.uniforms(200)), extreme)
            assert read(task, task.rows(uniforms, 200, haystack).tokens[0])[2]


def test_counts_grow_with_the_length():
    task = make_task("multikey", TaskConfig(needles=3, queries=2, needles_per_1024=8, queries_per_1024=4), BYTES)
    assert task.counts(128) == (3, 2)
    assert task.counts(4096) == (32, 16)


def test_answers_alone_have_their_weight(haystack):
    samples = make_task("multikey", TaskConfig(), BYTES).sample(np.random.default_rng(0), 128, haystack, 2)
    np.testing.assert_array_equal(samples.loss_weights == TaskConfig().answer_weight, samples.answers)


def test_other_tokenizers_have_exact_lengths(tmp_path):
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a line of text with #ab=1234 in it\n"] * 20, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(str(tmp_path))
    ids = loaded.encode("a line of text, nothing else. " * 100)
    haystack = sources.Subset(sources.InMemorySource(["h"], [ids], [0], loaded.vocab_size), np.arange(1))
    task = make_task("multikey", TaskConfig(), loaded)
    tokens = task.sample(np.random.default_rng(0), 200, haystack).tokens[0]
    text = loaded.decode(tokens)
    assert len(re.findall(r"#[a-z]{2}=[0-9]{4}\n", text)) == 4
    for key, value in re.findall(r"\?([a-z]{2})=([0-9]{4})\n", text):
        assert f"#{key}={value}\n" in text


@pytest.mark.parametrize(
    ("kind", "settings", "length", "message"),
    [
        ("multikey", {"needles": 8}, 64, "lower task.needles"),
        ("multikey", {"needles": 2, "queries": 3}, 256, "exceeds the 2 needles of a row"),
        ("multikey", {"needles": 30, "key_length": 1}, 4096, "raise key_length"),
        ("key_value", {"queries": 4}, 70, "lower task.queries"),
        ("variable_tracking", {"needles": 4, "hops": 6}, 128, "lower task.needles"),
        ("multikey", {}, 10**6, "larger corpus"),
    ],
)
def test_what_does_not_fit(kind, settings, length, message, haystack):
    with pytest.raises(UserError, match=message):
        make_task(kind, TaskConfig(**settings), BYTES).sample(np.random.default_rng(0), length, haystack)


def test_wrong_depths_and_kinds(haystack):
    with pytest.raises(UserError, match="from 0 to 1"):
        make_task("multikey", TaskConfig(), BYTES).sample(np.random.default_rng(0), 256, haystack, depth=1.5)
    with pytest.raises(UserError, match="remove depth"):
        make_task("variable_tracking", TaskConfig(), BYTES).sample(np.random.default_rng(0), 256, haystack, depth=0.5)
    with pytest.raises(UserError, match="did you mean 'multikey'"):
        make_task("multkey", TaskConfig(), BYTES)
    with pytest.raises(UserError, match="task.needles=0"):
        build(TaskConfig, {"needles": 0})


def test_a_batch_of_short_rows_is_cheap(haystack):
    task = make_task("multikey", TaskConfig(needles=3, queries=3), BYTES)
    rng, times = np.random.default_rng(0), []
    for _ in range(20):
        begun = time.thread_time()
        task.sample(rng, 64, haystack, 128)
        times.append(time.thread_time() - begun)
    assert min(times) < 0.02
