import dataclasses
import html.parser
import json
import re

import pytest

from lcx.core.errors import UserError
from lcx.evals import results
from lcx.report import history
from lcx.report.report import write_report
from lcx.training.workdir import record_environment
from tests.report.synthetic import STAGES, write_run


class Reader(html.parser.HTMLParser):
    """The text of a page, its tags and every attribute that could fetch something."""

    def __init__(self):
        super().__init__()
        self.text, self.open, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny <run>")
    write_run(folder)
    record_environment(folder, ["lcx", "run", "--config=configs/x.py", "--config.name=a b"])
    write_report(folder)
    return folder


def read(workdir) -> tuple[str, Reader]:
    page = (workdir / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return page, reader


def test_the_report_needs_nothing_else(workdir):
    page, reader = read(workdir)
    assert reader.links and all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert len(reader.links) == 5
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script", re.sub(r"base64,[^']+", "", page))
    assert "prefers-color-scheme: dark" in page


def test_the_report_holds_the_numbers_it_was_given(workdir):
    page, reader = read(workdir)
    text = " ".join(reader.text)
    for wanted in (
        "256 → 4,096 tokens", "Context extended 16× in 1 stage.",
        "10.6% → 98.3%",  # needles beyond 256: 19 and 177 of 180
        "256 → 4,096", "467 → 3.25", "8,192 held-out tokens",
        "oscillating: straightness 0.31 is below 1.0", "straight down: loss falls 40.0%",
        "900", "31K", "81,920", "163,840",  # theta and tokens of the two tries: 10 and 20 steps of 2 x 4096
        "8.75", "14.5", "7.75",
        "lcx run --config=configs/x.py '--config.name=a b'", '"model_dim": 77',
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "tiny <run>" in text and "<run>" not in page.split("<style>")[0].split("<title>")[1]
    assert "longest with more than 85.6% of needles; 95% interval 4,096–4,096" in text
    # At 256 tokens 59 of 60 before, all 60 after.
    assert "The extended model is worse than before beyond chance in 0 of 1 comparison." in text
    assert "98.3% 100.0% +1.7% ±" in re.sub(r"\s+", " ", text)
    # Loss by part over the last tenth of the steps, and in grey over the first: needles have one step there, text two.
    far = STAGES[2].loss
    cells = (far[-2] - 0.5, far[0] - 0.5, sum(far[-2:]) / 2 + 0.5, sum(far[:2]) / 2 + 0.5)
    assert "far " + " ".join(f"{cell:.3f}" for cell in cells) in re.sub(r"\s+", " ", text)
    for length, share in (("512", "35%"), ("4,096", "5%")):
        assert share in text, length


def test_schemes_that_were_asked_fewer_needles_say_so(workdir, tmp_path):
    assert "needles a cell" not in read(workdir)[0] and "found in grey, of 20 in each cell." in read(workdir)[0]
    write_run(tmp_path)
    before = results.read(tmp_path / "eval" / "before.json")
    few = tuple(dataclasses.replace(row, n=4) if row.task == "needles" and row.scheme == "yarn" else row for row in before.rows)
    results.write(dataclasses.replace(before, rows=few), tmp_path / "eval" / "before.json")
    write_report(tmp_path)
    text = re.sub(r"\s+", " ", " ".join(read(tmp_path)[1].text))
    assert "scheme needles a cell 256" in text and "yarn 4 4.25 100%" in text and "unchanged 20 4.25 98%" in text
    assert "theta raised – 4.25" in text and "extended 20 4 100%" in text
    assert "where the numbers of needles a cell differ, so do the needles" in text


def test_the_pictures_lie_beside_it(workdir):
    names = {path.name for path in (workdir / "plots").iterdir()}
    assert names == {"summary.png", "needles.png", "perplexity.png", "positions.png", "loss.png", "loss_by_part.png"}


def test_history_reads_stages_back(workdir):
    run = history.load(workdir)
    stages = run.stages()
    assert [stage.curve for stage in stages] == list(STAGES)
    base, _, far = (stage.parts for stage in stages)
    assert base == {} and list(far) == ["needles", "text"]
    assert far["text"].steps == STAGES[2].steps and far["needles"].steps == STAGES[2].steps[::2]
    assert far["needles"].loss == tuple(loss - 0.5 for loss in STAGES[2].loss[::2])
    assert [stage.tokens for stage in stages] == [40 * 256 * 8, 10 * 4096 * 2, 20 * 4096 * 2]
    assert [stage.seconds for stage in stages] == [80, 80, 160]
    assert [len(stage.decisions) for stage in stages] == [0, 1, 1]
    assert stages[2].final_loss == pytest.approx(sum(STAGES[2].loss[-2:]) / 2)
    assert run.before.label == "before" and run.after.label == "after"


def test_a_step_logged_twice_counts_once(tmp_path):
    rows = [{"step": step, "stage": "a", "attempt": 0, "loss": loss} for step, loss in ((1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (stage,) = history.load(tmp_path).stages()
    assert stage.curve.loss == (3.0, 2.0, 1.0)


def test_a_run_that_is_not_finished_says_so(tmp_path):
    write_run(tmp_path)
    (tmp_path / "eval" / "before.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    names = [stage.name for stage in STAGES if stage.kept]
    rows = [{"step": i, "stage_step": i, "stage": name, "loss": 2.0} for name in names for i in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [{"name": name, "steps": 3} for name in names]
    (tmp_path / "config.json").write_text(json.dumps({**config, "stages": stages}))
    assert "Not finished" not in write_report(tmp_path).read_text()
    stages[-1]["steps"] = 1200
    (tmp_path / "config.json").write_text(json.dumps({**config, "stages": stages}))
    assert f"Not finished: {names[-1]} has 3 of 1,200 steps." in write_report(tmp_path).read_text()


def test_part_of_a_run_makes_a_report_too(tmp_path):
    write_run(tmp_path)
    (tmp_path / "eval" / "before.json").unlink()
    (tmp_path / "decisions.jsonl").unlink()
    assert "4,096 tokens" in write_report(tmp_path).read_text()
    (tmp_path / "eval" / "after.json").unlink()
    assert "Training loss" not in write_report(tmp_path).read_text().split("<img")[0]
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has neither metrics.jsonl nor eval"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "none")
