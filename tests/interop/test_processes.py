"""A checkpoint read onto a mesh of two processes, each its own part of it, and written by one of them."""

import re

import numpy as np

from lcx.core.trees import paths
from lcx.interop.folder import HfFolder
from lcx.interop.shards import Shards
from tests.interop import hf_models
from tests.launch.job import answers

PROGRAM = """
import sys
import jax
port, rank, source, out = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
import numpy as np
from pathlib import Path
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.trees import paths
from lcx.interop import folder
from lcx.interop.shards import Shards

read, opened = 0, Shards.open

def counted(self, name):
    inner = opened(self, name)
    class Counted:
        def __enter__(self):
            piece = inner.__enter__()
            def count(box):
                global read
                found = piece(box)
                read += found.nbytes
                return found
            return count
        def __exit__(self, *args):
            return inner.__exit__(*args)
    return Counted()

Shards.open = counted
given = folder.HfFolder(source)
read = 0
params = given.params("float32", make_mesh(MeshConfig(fsdp=2, tensor=2)))
whole = np.load(Path(out).with_suffix(".npz"))
for path, x in paths(params):
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), whole[path][shard.index])
print("read", read)
described = given.described
folder.save(Path(out), params, described.model, described.schemes, described.length, "float32", Path(source))
"""


def test_two_processes(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    hf_models.make("llama", source, shard="100KB")
    whole = dict(paths(HfFolder(source).params("float32")))
    np.savez(out.with_suffix(".npz"), **{path: np.asarray(x) for path, x in whole.items()})
    heard = answers(PROGRAM, source, out)
    # Two processes of two devices, rows over the one axis and columns over the other: half each, but for what all have.
    stored, written = Shards(source), Shards(out)
    total = sum(stored.read(name).nbytes for name in stored.shapes)
    for said in heard:
        # The library that connects them writes lines of its own.
        (read,) = re.findall(r"^read (\d+)$", said, re.MULTILINE)
        assert int(read) < 0.6 * total
    assert written.shapes == stored.shapes
    for name in stored.shapes:
        np.testing.assert_array_equal(written.read(name), stored.read(name))
