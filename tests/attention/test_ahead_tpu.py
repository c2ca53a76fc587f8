"""Programs compiled ahead for TPUs that are not here: the kernels compile, and a ring hides its transfers behind them.

libtpu compiles without a TPU. `make test` puts it where jax does not find it by itself, for a process that has a libtpu but no TPU
says so at its start.
"""

import functools
import importlib.util
import os
import re
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from lcx.attention.attend import attend
from lcx.attention.pallas.flash import flash
from lcx.attention.parallel.sequence_layout import arrange, restore
from lcx.attention.spec import AttentionSpec, Blocks
from lcx.core.batch import Index
from lcx.core.mask import Band, Mask
from lcx.core.mesh import AXES, MeshConfig, make_mesh, named_sharding
from lcx.positions.bias import AlibiBias
from lcx.positions.rotary import Rope, tables
from lcx.positions.scheme import Heads
from tests.attention.cases import call

LIBRARY = Path(os.environ.get("TPU_LIBRARY_PATH", Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"))

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() and importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: see the Makefile"
)

N, K, H = 32, 8, 128


def chips(name):
    """The devices of a slice, as the compiler sees them."""
    # Nothing is run there: several processes may compile at once, and no machine's metadata is asked for.
    known = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    if LIBRARY.exists():
        known["TPU_LIBRARY_PATH"] = str(LIBRARY)
    with mock.patch.dict(os.environ, known):
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def one_chip(name):
    return jax.sharding.Mesh(np.asarray(chips(name)[:1]).reshape((1,) * len(AXES)), AXES)


def abstract(mesh, shape, dtype):
    axes = ("batch", "sequence", *(None,) * (len(shape) - 2))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, axes))


def compiled(mesh, run, *args):
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(*args).compile()


def pulled(run, q, k, v, do):
    o, pull = jax.vjp(run, q, k, v)
    return o, pull(do)


KERNELS = [
    (128, jnp.bfloat16, {"mask": Mask()}),
    (
        64,
        jnp.float32,
        {
            "mask": Mask(window=300, prefix=True, band=Band(1, 7, 8)),
            "softcap": 5.0,
            "bias": AlibiBias(),
            "bias_params": {"slopes": jnp.ones(8)},
        },
    ),
]
QUICK = {("v5p:2x2x1", 128)}


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype", "options"),
    [
        pytest.param(name, *case, marks=[pytest.mark.slow] * ((name, case[0]) not in QUICK))
        for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2x1")
        for case in KERNELS
    ],
)
def test_kernels_compile(name, head_dim, dtype, options):
    mesh = one_chip(name)
    q, k = (abstract(mesh, (1, 1000, heads, head_dim), dtype) for heads in (8, 2))
    token = abstract(mesh, (1, 1000), jnp.int32)

    def run(q, k, v, do, index):
        kernel = functools.partial(call, flash, scale=0.1, blocks=Blocks(64, 256), **options)
        return pulled(lambda *x: kernel(*x, index, index)[0], q, k, v, do)

    text = compiled(mesh, run, q, k, k, q, Index(token, token, token, token)).as_text()
    assert {"flash_forward", "flash_backward_queries", "flash_backward_keys"} <= set(re.findall(r"flash_[a-z_]+", text))


def attention(length, layout):
    """Forward and backward of causal rotary attention as a layer calls it."""
    scheme = Rope(theta=5e5)
    scheme, buffers = scheme.spec(length), scheme.buffers(Heads(N, K, H, N * H), length)
    spec = AttentionSpec(Mask(), scheme, scale=H**-0.5, strategy="ring")

    def run(q, k, v, do, index):
        index = index.replace(layout=layout)
        turned = tables(scheme, buffers, index.positions)
        return pulled(lambda *x: attend(spec, *x, index, index, q_tables=turned, k_tables=turned), q, k, v, do)

    return run


def program(mesh, tokens, layout):
    """The compiled program over a mesh whose chips have `tokens` each."""
    length = tokens * mesh.size
    q, k = (abstract(mesh, (1, length, heads, H), jnp.bfloat16) for heads in (N, K))
    token = abstract(mesh, (1, length), jnp.int32)
    return compiled(mesh, attention(length, layout), q, k, k, q, Index(token, token, token))


def schedule(text):
    """{computation: [(operation, name, operands)]} in the order in which they run; a Pallas call's operation is "kernel"."""
    assert "is_scheduled=true" in text
    found, here = {}, None
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            here = found.setdefault(opened.group(1), [])
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([a-z][a-z\-]*)\(([^)]*)\)", line):
            name, operation, operands = instruction.groups()
            here.append(("kernel" if "tpu_custom_call" in line else operation, name, re.findall(r"%([\w.\-]+)", operands), line))
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("v5p:2x2x1", "v5p:2x2x2", "v5p:4x4x4")])
def test_ring_hides_its_transfers_behind_kernels(name):
    """In little more memory than the kernel takes for as many tokens on one chip."""
    tokens, devices = 4096, chips(name)
    ring = program(make_mesh(MeshConfig(fsdp=1, context=len(devices)), devices), tokens, "zigzag")
    text = ring.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    check_order(text)
    alone = program(one_chip(name), tokens, "contiguous")
    above = ring.memory_analysis().temp_size_in_bytes - alone.memory_analysis().temp_size_in_bytes
    numbers, keys = tokens * N * H, 2 * tokens * K * H
    hop = 2 * keys + 4 * 2 * tokens * H // 2 + 4 * 3 * tokens  # keys and values, rotary tables, index
    accumulators = 4 * (2 * numbers + tokens * N) + 4 * 2 * keys  # o, lse and dq; dk and dv that leave and that arrive
    assert above <= hop + accumulators, [x / 2**20 for x in (above, hop, accumulators)]


def check_order(text):
    """Every transfer but that of the index starts before a kernel and is done after it."""
    steps = schedule(text)
    bodies = {body for body in re.findall(r"body=%?([\w.\-]+)", text) if any(x[0] == "kernel" for x in steps[body])}
    assert len(bodies) == 2  # one loop over the hops forward, one backward
    moved = []
    for body in bodies:
        kernels = [at for at, step in enumerate(steps[body]) if step[0] == "kernel"]
        started = {step[1]: at for at, step in enumerate(steps[body]) if step[0] == "collective-permute-start"}
        for at, (operation, _, operands, line) in enumerate(steps[body]):
            if operation == "collective-permute-done" and " s32[" not in line:
                moved.append(line)
                assert any(started[operands[0]] < kernel < at for kernel in kernels), (body, line)
    assert len(moved) == 7  # keys, values and rotary tables, forward and backward; dk with dv


@pytest.mark.parametrize("layout", ["zigzag", pytest.param("striped", marks=pytest.mark.slow)])
def test_tokens_are_dealt_without_gather_or_loop(layout):
    mesh = one_chip("v5p:2x2x1")
    rows, hidden = (abstract(mesh, shape, dtype) for shape, dtype in [((2, 65536), jnp.int32), ((2, 65536, 512), jnp.bfloat16)])
    for there in (arrange, restore):
        text = compiled(mesh, lambda x, there=there: there(x, layout, 8), (rows, hidden)).as_text()
        used = {step[0] for computation in schedule(text).values() for step in computation}
        assert not used & {"gather", "while", "dynamic-slice", "sort"}, used
