import pytest

from lcx.report.retention import called


@pytest.mark.parametrize(
    ("task", "metric", "name"),
    [
        ("needles", "accuracy", "needles"),
        ("qa_1", "score", "qa_1"),
        ("perplexity", "nll", "loss, held-out text"),
        ("perplexity", "final_nll", "loss, last tokens of held-out text"),
        ("perplexity", "bits_per_byte", "bits per byte, held-out text"),
        ("loss_by_kind_copied_far", "nll", "loss by kind: copied far"),
        ("loss_by_source_my_books", "nll", "loss by source: my_books"),
        ("long_perplexity", "nll", "loss, key tokens (LongPPL)"),
        ("long_perplexity", "other_nll", "loss, other tokens"),
        ("another", "nll", "another (nll)"),
    ],
)
def test_rows_are_named_by_what_they_hold(task, metric, name):
    assert called(task, metric) == name
