"""What a job is made of: names, mounts, variables and secrets; TPU slices."""

import pytest

from lcx.core.errors import UserError
from lcx.launch import job
from lcx.launch.job import JobSpec, Mount
from lcx.launch.tpu import GENERATIONS, Slice


def test_names_are_safe_and_stay_apart():
    assert job.job_name("quickstart_smoke") == "quickstart-smoke"
    names = [job.job_name(text) for text in ("theta=4000,seed=1", "theta=4000,seed=2", "theta.4000_seed.1", "9", "", "x" * 200)]
    assert len(set(names)) == len(names)
    for name in names:
        assert JobSpec(name, ("run",)).name == name
    assert job.job_name("x" * 200) != job.job_name("x" * 201)


@pytest.mark.parametrize("name", ["Big", "a_b", "-a", "a-", "1a", "a" * 41, "", "a b"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="cannot name a job"):
        JobSpec(name, ("run",))


def test_items_by_name():
    assert job.named("secret", ["A=x=y", "B_2=z"], "where") == {"A": "x=y", "B_2": "z"}
    assert job.environment(["HF_HOME=/data/hf", "KEYBOARD=de", "MONKEY=1"]) == {
        "HF_HOME": "/data/hf",
        "KEYBOARD": "de",
        "MONKEY": "1",
    }
    for item in ("A", "=x", "A=", "1A=x", "A B=x"):
        with pytest.raises(UserError, match="is not of the form NAME="):
            job.named("env", [item], "value")
    with pytest.raises(UserError, match="--env=A=... is given twice"):
        job.named("env", ["A=1", "A=2"], "value")


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "password", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS"]
)
def test_values_that_are_secret_stay_out_of_files(name):
    with pytest.raises(UserError, match=f"--env={name}=... would write its value into a file; give --secret={name}=WHERE"):
        job.environment([f"{name}=s3cret"])


def test_mounts():
    assert job.mounts(["gs://b/c:/mnt/b/", "/a:/b"]) == (Mount("gs://b/c", "/mnt/b"), Mount("/a", "/b"))
    for item in ("gs://b", "gs://b:mnt", ":/mnt", "/a:/", "gs:://"):
        with pytest.raises(UserError, match="is not of the form SOURCE:/FOLDER"):
            job.mounts([item])
    with pytest.raises(UserError, match="is given twice; give each folder one source"):
        job.mounts(["/a:/m", "/b:/m"])


@pytest.mark.parametrize(
    "values", [{"setup": "a\nb"}, {"image": "a\tb"}, {"workdir": "a\x00"}, {"words": ("run", "--config.a=\r")}]
)
def test_control_characters_are_refused(values):
    with pytest.raises(UserError, match="holds the control character"):
        JobSpec(**{"name": "a", "words": ("run",), **values})


@pytest.mark.parametrize(
    "kind, topology, chips, hosts, accelerator",
    [
        ("v5e", "1x1", 1, 1, "v5litepod-1"),
        ("v5e", "2x4", 8, 1, "v5litepod-8"),
        ("v5e", "16x16", 256, 64, "v5litepod-256"),
        ("v6e", "4x4", 16, 4, "v6e-16"),
        ("v5p", "2x2x1", 4, 1, "v5p-8"),
        ("v5p", "4x4x4", 64, 16, "v5p-128"),
        ("v4", "2x2x4", 16, 4, "v4-32"),
    ],
)
def test_slices(kind, topology, chips, hosts, accelerator):
    """Accelerator types as Google Cloud's documentation lists them for these topologies."""
    place = Slice(kind, topology)
    assert (place.chips, place.hosts, place.accelerator_type) == (chips, hosts, accelerator)
    assert place.chips_per_host * place.hosts == chips


def test_wrong_slices():
    with pytest.raises(UserError, match="--tpu='v5' is unknown; did you mean 'v5"):
        Slice("v5", "2x2")
    with pytest.raises(UserError, match="--topology=4x4 does not fit --tpu=v5p, whose topologies have 3 numbers, as in 2x2x2"):
        Slice("v5p", "4x4")
    with pytest.raises(UserError, match="--topology=3x3 is none of --tpu=v5e; it has 1x1, 2x2"):
        Slice("v5e", "3x3")
    with pytest.raises(UserError, match="--topology=1x1x1 has 1 chips, which do not divide into hosts of 4"):
        Slice("v4", "1x1x1")
    with pytest.raises(UserError, match="does not fit"):
        Slice("v5e", "four")
    with pytest.raises(UserError, match="--tpu=tpu7x has no TPU VMs; use --backend=gke"):
        _ = Slice("tpu7x", "2x2x1").accelerator_type
    assert set(GENERATIONS) == {"v4", "v5e", "v5p", "v6e", "tpu7x"}
