"""What a log gets of a progress bar, where there is no terminal."""

import time

from lcx.core import console


def test_a_log_hears_of_a_long_task_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with console.Progress("measuring", 4, every=None) as bar:
        bar.advance()
        for seconds in (1.0, 29.0, 31.0, 60.0, 62.0):
            now[0] = seconds
            bar.note(f"answer at {seconds:.0f} s")
    assert capsys.readouterr().out == "measuring 1/4: answer at 31 s\nmeasuring 1/4: answer at 62 s\n"
