"""The GPU kernel: interpreted on the host, against dense in value and in every gradient; and lowered to Triton without a GPU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from lcx.attention.attend import attend
from lcx.attention.dense import dense
from lcx.attention.pallas.flash import flash
from lcx.attention.pallas.gpu_walk import tile_ranges, visit_tiles
from lcx.attention.spec import AttentionSpec, Blocks, KernelSpec
from lcx.core.batch import SHARED, Index
from lcx.core.mask import Band, Mask, visible
from lcx.core.mesh import AXES, MeshConfig, partition_spec
from lcx.positions.bias import AlibiBias
from lcx.positions.rotary import Rope, tables
from lcx.positions.scheme import Heads
from tests.attention.cases import call, errors, within
from tests.attention.test_blockwise import chunk_index, draw
from tests.attention.test_flash import STRUCTURES, check_chunk, check_ring, check_split, over_rows

ALL = {
    "mask": Mask(window=300, prefix=True, band=Band(1, 7, 8)),
    "softcap": 5.0,
    "bias": AlibiBias(),
    "bias_params": {"slopes": jnp.ones(8)},
}


@pytest.mark.parametrize("case", over_rows(STRUCTURES[1:2]), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_flash_equals_dense(case):
    found = errors(case, optimize=False, kernel="flash gpu")
    assert within(found), found


@pytest.mark.slow
def test_chunk_with_lse_cotangent_and_empty_rows():
    check_chunk(functools.partial(call, flash, blocks=Blocks(16, 16), platform="gpu", interpret=True))


def test_lse_of_bfloat16_is_not_rounded():
    (q, k, v, *_), where = draw(jnp.bfloat16), chunk_index()
    served = functools.partial(call, flash, scale=0.3, blocks=Blocks(16, 32), platform="gpu", interpret=True)
    run = jax.jit(lambda *x: served(*x, *where, Mask()), compiler_options={"xla_backend_optimization_level": 0})
    o, lse = run(q, k, v)
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    # Products of bfloat16 are exact in float32.
    _, wanted = call(dense, *(x.astype(jnp.float32) for x in (q, k, v)), *where, Mask(), scale=0.3)
    np.testing.assert_allclose(lse, wanted, atol=2e-6)


def rows(case):
    """[2, 96] tokens of documents that end within blocks; `shared`: the first is seen by all; `dealt`: early and late chunks."""
    order = jnp.broadcast_to(jnp.arange(96, dtype=jnp.int32), (2, 96))
    segments = jnp.where(order < jnp.asarray([[40], [70]]), 1, 2)
    if case == "shared":
        segments = jnp.where(order == 0, SHARED, segments)
    if case == "padding":
        segments = jnp.where(order >= 50, 0, segments)
    index = Index(order, order, segments, (order < 3).astype(jnp.int32))
    return index if case != "dealt" else jax.tree.map(lambda x: jnp.concatenate([x[:, :16], x[:, 80:], x[:, 16:80]], axis=1), index)


@pytest.mark.parametrize("case", ["plain", "shared", "padding", "dealt"])
@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(window=9, prefix=True),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (Mask(window=30), Mask(causal=False), Mask(band=Band(10, 50)))),
    ],
    ids=str,
)
@pytest.mark.parametrize("keys_pass", [True, False])
def test_walk_visits_what_is_seen_once_and_masks_what_is_seen_in_part(case, mask, keys_pass):
    index, side, count = rows(case), 8, 12
    rule = KernelSpec(mask, 1.0, blocks=Blocks(side, side), kernel="flash", platform="gpu", interpret=True)
    known = jax.jit(lambda index: tile_ranges(rule, index, index, keys_pass))(index)

    def visited(b, i):
        def tile(masked, j, carry):
            return carry.at[j, int(masked)].add(1)

        return visit_tiles(rule, known, (2, count, count), b, i, keys_pass, tile, jnp.zeros((count, 2), jnp.int32))

    every = jax.jit(jax.vmap(jax.vmap(visited, (None, 0)), (0, None)))(jnp.arange(2), jnp.arange(count))
    seen = np.asarray(visible(mask, index, index)).reshape(2, count, side, count, side)
    some, whole = seen.any(axis=(2, 4)), seen.all(axis=(2, 4))
    some, whole = (x if keys_pass else x.swapaxes(1, 2) for x in (some, whole))
    unmasked, masked = np.asarray(every[..., 0]), np.asarray(every[..., 1])
    assert (unmasked + masked <= 1).all()
    assert ((unmasked + masked)[some] == 1).all() and whole[unmasked == 1].all()
    if case == "plain" and mask == Mask():
        assert (unmasked + masked).sum() == some.sum() and unmasked.sum() == whole.sum()


@pytest.mark.slow
def test_ring_of_flash_equals_dense():
    check_ring("flash gpu", 2)


@pytest.mark.slow
def test_rows_and_heads_are_split_over_a_mesh():
    check_split("flash gpu")


def gpus(**sizes):
    """A mesh of GPUs that are not here."""
    count = math.prod(sizes.values())
    axes = MeshConfig(**sizes).sizes(count)
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    return AbstractMesh(tuple(axes[name] for name in AXES), AXES, (AxisType.Auto,) * len(AXES), abstract_device=device)


def lowered(mesh, run, *args):
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def triton_calls(text):
    return [line for line in text.splitlines() if "custom_call @__gpu$xla.gpu.triton" in line]


QUICK = {(96, jnp.bfloat16, "plain"), (96, jnp.float32, "all")}


@pytest.mark.parametrize(
    ("head_dim", "dtype", "options"),
    [
        pytest.param(
            head_dim, dtype, options, id=f"{head_dim}-{dtype.__name__}-{name}",
            marks=[pytest.mark.slow] * ((head_dim, dtype, name) not in QUICK),
        )
        for head_dim in (64, 96, 128)
        for dtype in (jnp.bfloat16, jnp.float32)
        for name, options in (("plain", {"mask": Mask()}), ("all", ALL))
    ],
)  # fmt: skip
def test_lowers_to_triton(head_dim, dtype, options):
    q, k = (jax.ShapeDtypeStruct((2, 1000, heads, head_dim), dtype) for heads in (8, 2))
    token = jax.ShapeDtypeStruct((2, 1000), jnp.int32)

    def run(q, k, v, do, index):
        kernel = functools.partial(call, flash, scale=0.1, blocks=Blocks(64, 32), platform="gpu", **options)
        o, pull = jax.vjp(lambda *x: kernel(*x, index, index)[0], q, k, v)
        return o, pull(do)

    index = Index(token, token, token, token)
    calls = triton_calls(lowered(gpus(fsdp=1), run, q, k, k, q, index))
    assert len(calls) == 3
    for name in ("flash_forward", "flash_backward_queries", "flash_backward_keys"):
        assert sum(f'name = "{name}"' in line for line in calls) == 1


def test_ring_over_gpus_takes_flash_by_itself():
    """With rows, heads and tokens split: a kernel forward and two backward, for own keys and in the loop over the others'."""
    mesh = gpus(fsdp=2, tensor=2, context=4)
    N, K, H, T = 8, 4, 128, 8192
    scheme = Rope(theta=5e5)
    scheme, buffers = scheme.spec(T), scheme.buffers(Heads(N, K, H, N * H), T)
    spec = AttentionSpec(Mask(), scheme, scale=H**-0.5, strategy="ring")

    def run(q, k, v, do, index):
        index = index.replace(layout="zigzag")
        turned = tables(scheme, buffers, index.positions)
        o, pull = jax.vjp(lambda *x: attend(spec, *x, index, index, q_tables=turned, k_tables=turned), q, k, v)
        return o, pull(do)

    def abstract(*shape, dtype=jnp.bfloat16):
        axes = partition_spec(("batch", "sequence", *(None,) * (len(shape) - 2)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes))

    token = abstract(2, T, dtype=jnp.int32)
    q, k, index = abstract(2, T, N, H), abstract(2, T, K, H), Index(token, token, token, token)
    text = lowered(mesh, run, q, k, k, q, index)
    assert len(triton_calls(text)) == 6 and "collective_permute" in text
