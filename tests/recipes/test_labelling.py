"""Grades from a real HTTP server, through the command."""

import json
import random

import pytest

from lcx.cli.main import main
from tests import model_server

pytest.importorskip("sklearn", reason="the extra data")

CONFIG = """
from lcx.data.curation.config import curated, defaults

def get_config():
    labels = {{"endpoint": {{"url": "{url}", "model": "judge", "documents": 30}}}}
    scores = {{"quality": {{"kind": "quality", "settings": {{"labels": labels, "embedding": {{"kind": "hashed"}}}}}}}}
    texts = {{"kind": "text", "path": "{folder}/*.txt"}}
    return defaults({{"scores": scores}}, texts=curated("long", source=texts, filters=(), keep={{"quality": {{"minimum": 0.5}}}}))
"""


@pytest.fixture
def server():
    """A model that grades texts about rivers with 5; it answers once with an error."""
    asked, troubles = [], [500]

    class Handler(model_server.Handler):
        def do_POST(self):
            body = self.body()
            asked.append(body)
            text = body["messages"][-1]["content"]
            content = "Grade: 5" if "river" in text.split("Text:")[1] else "0"
            choice = {"index": 0, "message": {"role": "assistant", "content": content}}
            self.reply(troubles.pop() if troubles else 200, {"choices": [choice]})

    with model_server.Server(Handler) as found:
        yield found.url, asked


@pytest.mark.slow
def test_an_endpoint_labels_and_the_rest_is_scored(tmp_path, server, capsys):
    pytest.importorskip("openai", reason="the extra eval")
    url, asked = server
    rng = random.Random(0)
    for i in range(60):
        words = ["river", "bank", "water", "boat"] if i % 2 else ["stock", "bond", "market", "share"]
        (tmp_path / f"{i:02d}.txt").write_text(" ".join(rng.choice(words) for _ in range(200)))
    (tmp_path / "config.py").write_text(CONFIG.format(url=url, folder=tmp_path))
    main(["data", "curate", f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--workers=1"])
    said = capsys.readouterr().out
    assert "quality: learned from 30 labels (endpoint), embedding: hashed" in said and "auc 1.000" in said
    assert len(asked) == 31 and all(one["model"] == "judge" and one["temperature"] == 0 for one in asked)
    rows = [json.loads(line) for path in (tmp_path / "out" / "texts").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(rows) == 30 and all("river" in row["text"] and row["scores"]["quality"] > 0.5 for row in rows)
    main(["data", "curate", f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--workers=1"])
    assert len(asked) == 31


def test_an_endpoint_that_is_not_there(tmp_path, capsys):
    pytest.importorskip("openai", reason="the extra eval")
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"text {i} of twelve")
    text = CONFIG.format(url="http://127.0.0.1:9/v1", folder=tmp_path)
    (tmp_path / "config.py").write_text(text.replace('"documents": 30', '"documents": 30, "retries": 0'))
    with pytest.raises(SystemExit):
        main(["data", "curate", f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--workers=1"])
    assert "http://127.0.0.1:9/v1 cannot be reached" in capsys.readouterr().err
