"""Which steps are traced, and by which processes of a job."""

import pytest

from lcx.core.errors import UserError
from lcx.training.profile import FOLDER, Profiler, ProfileSteps, profile_steps


def test_steps_and_processes():
    assert profile_steps(None) is None
    assert profile_steps("3:5") == ProfileSteps(3, 5, (0,))
    assert profile_steps("3:5@2,0,2") == ProfileSteps(3, 5, (0, 2))
    assert profile_steps("3:5@all") == ProfileSteps(3, 5, None)
    for text in ("3:5@", "3:5@a", "3:5@-1", "3:5@0,", "3:5@all,1", "3"):
        with pytest.raises(UserError, match="is not a range of steps; give the first and the last, as in --profile=10:13, and"):
            profile_steps(text)


def test_a_process_that_is_not_there_is_named():
    ProfileSteps(1, 2, (0,)).check(0, 4)
    with pytest.raises(UserError, match="--profile names process 3, but the job has 1, counted from 0; name one of these"):
        ProfileSteps(1, 2, (0, 3)).check(0, 4)


def test_steps_that_are_done_again_are_traced_again(tmp_path, capsys):
    """The monitor may send a run back from within the steps."""
    with Profiler(ProfileSteps(2, 3), tmp_path) as profiler:
        for step in (1, 2, 1, 2, 3):
            with profiler.begin(step, lambda: None):
                pass
            profiler.end(step, lambda: None)
    assert "steps 2 to 3 are in" in " ".join(capsys.readouterr().out.split())


def test_a_process_that_is_not_chosen_traces_nothing_but_checks_the_steps(tmp_path):
    with Profiler(ProfileSteps(1, 2, (1,)), tmp_path) as profiler:
        with profiler.begin(1, lambda: None):
            pass
        profiler.end(2, lambda: None)
        with pytest.raises(UserError, match="goes beyond the last step"):
            profiler.check(0, 1)
    assert not (tmp_path / FOLDER).exists()
