"""Run configs: order, overrides, and what is answered when they are wrong."""

import jax
import ml_collections
import pytest
import tiny

from lcx.core.configs import build, plain
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig
from lcx.data.schedule import Schedule
from lcx.positions.registry import from_config
from lcx.training.builder import StageBuilder
from lcx.training.ladder import PreviousStage, choose
from lcx.training.stages import RunConfig, run_config


def named(**stages):
    return tiny.config(stages={name: {"steps": 4, "batch_size": 8, **stage} for name, stage in stages.items()})


def test_named_stages_are_ordered_by_length_or_as_told():
    config = ml_collections.ConfigDict(named(zeta={"seq_len": 64}, alpha={"seq_len": 256}, mid={"seq_len": 128}))
    config.stages.alpha.steps = 7  # what a flag does
    assert [(s.name, s.steps) for s in run_config(config).stages] == [("zeta", 4), ("mid", 4), ("alpha", 7)]
    config.stage_order = ("mid", "alpha", "zeta")
    assert [s.name for s in run_config(config).stages] == ["mid", "alpha", "zeta"]


def test_a_saved_config_reads_back():
    run = run_config(tiny.config(stages=tiny.stages(mesh={"data": 2, "fsdp": 1}, optim={"lr": 1e-4})))
    assert build(RunConfig, plain(run)) == run


def test_positions_change_from_stage_to_stage():
    values = tiny.config(positions={"default": {"name": "rope", "theta": 100.0, "partial": 0.5}})
    values["stages"] = [
        {"name": "a", "seq_len": 64, "steps": 1, "batch_size": 1},
        {"name": "b", "seq_len": 128, "steps": 1, "batch_size": 1, "positions": {"default": 400.0}},
        {"name": "c", "seq_len": 256, "steps": 1, "batch_size": 1, "positions": {"default": "linear:factor=2"}},
        {"name": "d", "seq_len": 512, "steps": 1, "batch_size": 1},
    ]
    a, b, c, d = (choose(run_config(values), [], stage, None)[1]["default"] for stage in range(4))
    assert (a.theta, b.theta, b.partial, c.name, c.theta, c.partial) == (100.0, 400.0, 0.5, "linear", 400.0, 0.5)
    assert d == c


def test_a_theta_reaches_the_scaling_inside():
    values = tiny.config(positions={"default": "dual_chunk:original_length=64,scaling=yarn"})
    values["stages"] = tiny.stages(positions={"default": 1e6})
    scheme = choose(run_config(values), [], 1, None)[1]["default"]
    assert (scheme.theta, scheme.scaling.theta, scheme.original_length, scheme.scaling.original_length) == (1e6, 1e6, 64, 64)


def test_a_trained_length_is_that_of_the_weights():
    stage = {"name": "a", "seq_len": 256, "steps": 1, "batch_size": 1, "positions": {"default": "yarn"}}

    def length(scheme, before=None):
        run = run_config(tiny.config(positions={"default": scheme}, stages=[stage]))
        return choose(run, [], 0, before)[1]["default"].original_length

    assert length("rope") == 256
    assert length("rope:original_length=64") == 64  # no weights have seen 256 tokens
    extended = PreviousStage({"default": from_config("rope:original_length=64")}, 128)
    assert length("rope:original_length=64", extended) == 128


def test_mixture_and_parts_change_one_stage():
    run = run_config(tiny.config(stages=tiny.stages(mixture={"text": 0.9}, parts={"needles": {"task": {"needles": 3}}})))
    first, second = (run.data_of(stage).parts for stage in run.stages)
    assert (first["text"].weight, second["text"].weight, second["needles"].weight) == (0.5, 0.9, 0.5)
    assert (first["needles"].task.needles, second["needles"].task.needles, second["needles"].task.queries) == (1, 3, 1)


def test_weights_may_change_within_a_stage():
    run = run_config(tiny.config(stages=tiny.stages(mixture={"text": [[0, 0.9], [1, 0.3]], "needles": 0.25})))
    first, second = run.stages
    assert run.schedule_of(first) is None
    assert run.schedule_of(second) == Schedule(10, {"text": ((0.0, 0.9), (1.0, 0.3))})
    parts = run.data_of(second).parts
    assert (parts["text"].weight, parts["needles"].weight) == (pytest.approx(0.6), 0.25)
    assert build(RunConfig, plain(run)) == run
    tokens = run_config(tiny.config(stages=tiny.stages(mixture={"text": ((0, 0.9), (10 * 4 * 128, 0.3))})))
    assert tokens.schedule_of(tokens.stages[1]) == run.schedule_of(second)


def test_knots_of_one_weight_are_that_weight():
    """Bit for bit: the same mixture, so the same rows."""
    given = (0.1, ((0.0, 0.1), (0.7, 0.1), (1.0, 0.1)))
    runs = [run_config(tiny.config(stages=tiny.stages(mixture={"text": weight}))) for weight in given]
    assert runs[0].data_of(runs[0].stages[1]) == runs[1].data_of(runs[1].stages[1])
    assert runs[1].schedule_of(runs[1].stages[1]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "stages is empty"),
        ({"stages": tiny.stages(mixture={"text": -1.0})}, "stages.longer.mixture.text=-1.0 must not be negative"),
        ({"stages": tiny.stages(mixture={"text": "much"})}, "stages.*mixture.text='much': expected float"),
        ({"stages": tiny.stages(mixture={"text": ((0, 1), (0.5,))})}, r"mixture.text\[1\]=\(0.5,\): expected 2 values, got 1"),
        ({"stages": tiny.stages(mixture={"text": ((0, 1), (0.5, 1))})}, "stages.longer.mixture.text=.* covers 0 to 0.5"),
        ({"stages": tiny.stages(mixture={"txt": ((0, 1), (1, 0))})}, "'txt' is unknown; did you mean 'text'"),
        ({"sead": 1}, "config has no field 'sead'; did you mean 'seed'"),
        ({"stages": tiny.stages(name="base")}, "stages has 'base' twice"),
        ({"stages": tiny.stages(steps=0)}, r"stages.longer.steps=0 must be above 0"),
        (
            {"stages": tiny.stages(accumulate=3)},
            r"batch_size=4 must be divisible by accumulate=3; its divisors are \[1, 2, 4\]",
        ),
        ({"stages": tiny.stages(max_position=64)}, "max_position=64 is below seq_len=128"),
        ({"stages": tiny.stages(optim={"learning_rate": 1.0})}, "stages.longer.optim has no field 'learning_rate'"),
        ({"stages": tiny.stages(mixture={"txt": 1.0})}, "'txt' is unknown; did you mean 'text'"),
        ({"stages": tiny.stages(seq_leng=3)}, "has no field 'seq_leng'; did you mean 'seq_len'"),
        ({"monitor": {"enabled": True, "steps": 10, "skip": 0}}, "must exceed the monitor's 10 steps"),
        ({"stages": tiny.stages(thetas=[400.0])}, "stages.longer.thetas are what the monitor may try, but it does not watch"),
        ({"stages": tiny.stages(parts={"text": {"remap": "pose"}})}, "data.parts.text.remap='pose' changes no position"),
        ({"optim": {"schedule": "cosin"}}, "config.optim.schedule='cosin' is unknown; did you mean 'cosine'"),
    ],
)
def test_wrong_configs(changes, message):
    with pytest.raises(UserError, match=message):
        run_config(tiny.config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": tiny.stages(positions={"default": "ropy"})}, "'ropy' is unknown; did you mean 'rope'"),
        ({"stages": tiny.stages(positions={"globl": 4.0})}, "globl"),
        ({"stages": tiny.stages(positions={"default": -4.0})}, "theta=-4.0"),
        (
            {"mesh": {"data": 8, "fsdp": 1}},
            "batch_size=4 must be divisible by 16 \\(data=8 x fsdp=1 x expert=1 x accumulate=2\\)",
        ),
        ({"model": {**tiny.config()["model"], "prefix_attention": True}}, "model.prefix_attention=True has no effect"),
        ({"mesh": {"tensor": 4, "fsdp": 2}}, "model.num_heads=2 must be divisible by 4 .mesh axes tensor=4"),
        ({"mesh": {"fsdp": 3}}, "need 3 devices and 8 are available"),
        (
            {"monitor": {"enabled": True, "steps": 8, "skip": 0}, "stages": [{**tiny.stages()[1], "monitor": True}]},
            "set stages.longer.thetas",
        ),
        (
            {"monitor": {"enabled": True, "steps": 8, "skip": 0}, "data": {**tiny.config()["data"], "heldout_fraction": 0.0}},
            "stages.longer cannot be watched by the monitor, whose held-out rows cannot be made: .*; or set stages.longer.mon",
        ),
        ({"data": {"tokenizer": "bytes+bos"}}, "model.vocab_size=256 is below the 257 tokens of data.tokenizer='bytes\\+bos'"),
    ],
)
def test_what_does_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        StageBuilder(run_config(tiny.config(**changes)), [], jax.devices()[: 8 if "mesh" in changes else 1])


def test_a_mesh_of_its_own_for_a_stage():
    values = tiny.config(stages=tiny.stages(mesh={"data": 2, "fsdp": 4}, batch_size=16), mesh={"fsdp": 8})
    builder = StageBuilder(run_config(values), [], jax.devices())
    assert [dict(mesh.shape)["data"] for mesh in builder.meshes] == [1, 2]
    assert builder.run.mesh_of(builder.run.stages[1]) == MeshConfig(data=2, fsdp=4)
