"""Errors call settings what the user calls them."""

import pytest

from lcx.core.errors import UserError, naming

FLAGS = {"evals.lengths": "--lengths", "evals.length": "--no", "evals.questions.data": "--data"}


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        ("evals.lengths=(1,) must be longer", "--lengths=(1,) must be longer"),
        ("evals.lengths has 64; leave it out of evals.lengths.", "--lengths has 64; leave it out of --lengths."),
        ("name a folder with evals.questions.data: it", "name a folder with --data: it"),
        ("evals.questions.data.parts stays", "evals.questions.data.parts stays"),
        ("so do config.evals.lengths and evals.lengthsome", "so do config.evals.lengths and evals.lengthsome"),
    ],
)
def test_settings_are_renamed(raised, shown):
    with pytest.raises(UserError) as error, naming(FLAGS):
        raise UserError(raised)
    assert str(error.value) == shown


def test_other_errors_pass():
    with pytest.raises(ValueError, match="evals.lengths"), naming(FLAGS):
        raise ValueError("evals.lengths")
