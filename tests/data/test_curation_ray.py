"""Curation on a local Ray cluster of two nodes: the bytes of one process, and one sentence for what goes wrong."""

import importlib.util
import os
import socket
import sys
import time

import numpy as np
import pytest

from lcx.cli.main import main
from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.curation import cluster
from lcx.data.curation.config import CuratedSource, CurationConfig, DecontaminateConfig
from lcx.data.curation.pipeline import curate

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts in which some are duplicates, short, or not UTF-8, and one holds a test's words; its config."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    texts = [" ".join(f"word{i}" for i in rng.integers(0, 5000, 400)) + "." for _ in range(24)]
    secret = " ".join(f"secret{i}" for i in range(14))
    texts[3], texts[5], texts[7] = texts[1].upper(), texts[2].replace("word", "ward", 1), f"{texts[7]} {secret}"
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text)
    (folder / "24.txt").write_bytes(b"\xff")
    (folder / "secret.json").write_text(f'"{secret}"')
    source = CuratedSource(filters=("length", "gopher_repetition"), source=SourceConfig("text", f"{folder}/*.txt"))
    return CurationConfig({"a": source}, decontaminate=DecontaminateConfig(f"{folder}/secret.json"), shard_bytes=7000)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, curate(corpus, folder)


@pytest.fixture(scope="module")
def runner():
    """A `Runner` on two nodes of one CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        with cluster.engine(nodes.address) as found:
            yield found
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        nodes.shutdown()


@pytest.mark.slow
@needs_ray
def test_two_nodes_write_the_bytes_of_one_process(corpus, finished, runner, tmp_path):
    dropped = {stage: found["documents"] for stage, found in finished[1]["sources"]["a"]["dropped"].items() if found["documents"]}
    assert dropped == {"read": 1, "decontaminate": 1, "exact": 1, "minhash": 1}
    seen = []
    curate(corpus, tmp_path / "ray", run=runner, report=seen.append)
    curate(corpus, tmp_path / "two", workers=2)
    assert len(seen) > 8
    assert contents(tmp_path / "ray") == contents(tmp_path / "two") == contents(finished[0])


@pytest.mark.slow
@needs_ray
def test_what_ray_has_judged_is_taken_over_after_an_interruption(corpus, finished, runner, tmp_path):
    def stop(progress):
        if progress.shards == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curate(corpus, tmp_path / "out", run=runner, report=stop)
    assert len(list((tmp_path / "out" / "work" / "a").glob("*.json"))) == 4
    seen = []
    curate(corpus, tmp_path / "out", report=seen.append)
    assert 0 < seen[-1].fresh_bytes < seen[-1].bytes
    assert contents(tmp_path / "out") == contents(finished[0])


def node(seconds):
    import ray

    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id()


def end(code):
    os._exit(code)


def double(number):
    if number < 0:
        raise ZeroDivisionError("below nothing")
    return 2 * number


@pytest.mark.slow
@needs_ray
def test_results_come_in_order_from_both_nodes_and_few_tasks_are_drawn_ahead(runner):
    assert len(set(runner(node, [0.2] * 8))) == 2
    drawn = 0

    def tasks():
        nonlocal drawn
        for i in range(20):
            drawn += 1
            yield i

    for taken, result in enumerate(runner(double, tasks())):
        assert result == 2 * taken
        assert drawn - taken <= 2 * 2 + 1
    assert drawn == 20


@pytest.mark.slow
@needs_ray
def test_errors_come_as_they_are_and_a_worker_that_dies_is_said_in_a_sentence(runner):
    with pytest.raises(ZeroDivisionError, match="below nothing"):
        list(runner(double, [1, -1, 2]))
    with pytest.raises(
        UserError, match="a worker of the Ray cluster ended .*, often for want of memory; rerun the command with fewer"
    ):
        list(runner(end, [3]))
    assert list(runner(double, [4])) == [8]


@needs_ray
def test_a_cluster_that_does_not_answer_is_said_in_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: whoever connects is refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        message = f"the Ray cluster at '{address}' does not answer: .*refused; check --ray_address"
        with pytest.raises(UserError, match=message), cluster.engine(address):
            pass


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = r"--engine=ray needs the ray library; install the extra: pip install -e '\.\[ray\]'"
    with pytest.raises(UserError, match=message), cluster.engine():
        pass


def test_an_address_without_the_engine_is_refused(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from lcx.data.curation.config import curated, defaults\n"
        "def get_config():\n    return defaults(a=curated('long', source={'kind': 'text', 'path': 'x'}))\n"
    )
    with pytest.raises(SystemExit):
        main(["data", "curate", f"--config={config}", f"--out={tmp_path}/out", "--ray_address=auto"])
    assert "--ray_address=auto needs --engine=ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
