"""Checksums of a checkpoint that several processes write, each of its own part, and others read on another mesh."""

import json

import jax
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.training.checkpoints import Store
from lcx.training.meta import Meta
from lcx.training.stages import CheckpointConfig
from tests.launch.job import answers

PROGRAM = """
import json, sys
import jax
port, rank, workdir = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from lcx.core.errors import UserError
from lcx.training.checkpoints import Store
from lcx.training.meta import Meta
from lcx.training.stages import CheckpointConfig
from tests.launch.job import answers

mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
whole = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
rows, columns, copies = (NamedSharding(mesh, P(*spec)) for spec in (("fsdp",), (None, "fsdp"), ()))

def made(sharding):
    return jax.make_array_from_callback(whole.shape, sharding, lambda box: whole[box])

with Store(workdir, CheckpointConfig(keep_latest=9)) as store:
    store.save_params({"w": made(rows), "same": made(copies)}, Meta("a", 0, 0, 3, 3, 64, 0, "", {}))
    store.wait()
    said = {}
    for step in store.steps:
        for name, sharding in (("rows", rows), ("columns", columns), ("copies", copies)):
            like = jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding)
            try:
                params, _ = store.read_params(step, lambda _: {"w": like, "same": like})
                for shard in params["w"].addressable_shards:
                    np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
                said[f"{step} {name}"] = "whole"
            except UserError as error:
                said[f"{step} {name}"] = str(error)
print("said", json.dumps(said))
"""


def two(workdir):
    """What each of two processes says of each checkpoint under each sharding."""
    return [json.loads(out.split("said ", 1)[1].splitlines()[0]) for out in answers(PROGRAM, workdir)]


def alone(workdir, step):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.ShapeDtypeStruct((64, 16), np.float32, sharding=one)
    with Store(workdir, CheckpointConfig(), clean=False) as store:
        return store.read_params(step, lambda _: {"w": like, "same": like})[0]


def flip(workdir, step):
    """Two bytes in the middle of the largest file."""
    path = max((workdir / f"checkpoints/{step}").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(path.read_bytes())
    for at in (len(content) // 2, len(content) // 2 + 1):
        content[at] ^= 255
    path.write_bytes(bytes(content))


def test_two_processes_write_and_read_checksums(tmp_path):
    """Written by two and read by them, on the same mesh and another, and by one; written by one and read by two, whole and not."""
    whole = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    with Store(tmp_path, CheckpointConfig(keep_latest=9)) as store:
        for step in (1, 2):
            store.save_params({"w": whole * 1, "same": whole * 1}, Meta("a", 0, 0, step, step, 64, 0, "", {}))
    flip(tmp_path, 1)
    for said in two(tmp_path):
        assert len(said) == 9
        assert all("is damaged: " in text if key[0] == "1" else text == "whole" for key, text in said.items()), said
    sums = [json.loads((tmp_path / f"checkpoints/3/params/checksums.process_{rank}.json").read_text()) for rank in range(2)]
    assert [sorted(one["w"]["boxes"]) for one in sums] == [["0:16,0:16", "16:32,0:16"], ["32:48,0:16", "48:64,0:16"]]
    np.testing.assert_array_equal(alone(tmp_path, 3)["w"], whole)
    flip(tmp_path, 3)
    with pytest.raises(UserError, match="checkpoint 3 in .* is damaged: "):
        alone(tmp_path, 3)
