"""The files of every platform: read back by what reads them there, with values that no quoting may lose."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from lcx.core.errors import UserError
from lcx.launch.backends.gke import Gke
from lcx.launch.backends.skypilot import SkyPilot
from lcx.launch.backends.slurm import Slurm
from lcx.launch.backends.table import BACKENDS
from lcx.launch.backends.tpu_vm import TpuVm
from lcx.launch.job import JobSpec, Mount
from lcx.launch.launch import OPTIONS, launch, options_of, refuse_ignored

NASTY = """it's "$HOME" `id` \\ $(id) {{ x }} #1 ; & | * ~ é: - [1]"""
WORDS = ("run", "--config=configs/a b.py:smoke", f"--config.text={NASTY}", "--workdir=/mnt/b/x y")


def spec(**values):
    given = {"name": "my-job", "words": WORDS, "workdir": "/mnt/b/x y", "env": {"PLAIN": "1", "NASTY": NASTY}}
    return JobSpec(**{**given, **values})


BUCKET = (Mount("gs://bucket/sub", "/mnt/b"),)


def shell(script, tmp_path, commands, **environment):
    """Run a script with the programs `commands`, given by their Python (None: does nothing), in place of what it calls."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, code in commands.items():
        path = programs / name
        path.unlink(missing_ok=True)
        if code is None:
            path.symlink_to("/bin/true")
            continue
        path.write_text(f"#!{sys.executable} -SE\nimport json, os, sys\nargv = sys.argv[1:]\n{code}\n")
        path.chmod(0o755)
    env = {**os.environ, **environment, "PATH": f"{programs}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls")}
    return subprocess.run(["bash", script], env=env, capture_output=True, text=True, cwd=tmp_path)


NOTE = "open(os.environ['CALLS'], 'a').write(json.dumps([argv, {k: os.environ.get(k) for k in ('NASTY', 'SECRET')}]) + '\\n')"


def calls(tmp_path):
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def written(backend, job, options, tmp_path):
    ((name, text),) = BACKENDS[backend].files(job, options).items()
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("status, again", [(0, False), (1, False), (75, True), (143, True)])
def test_slurm_runs_what_was_asked_and_requeues_what_can_go_on(status, again, tmp_path):
    (tmp_path / "key").write_text("s3cret\n")
    options = Slurm(nodes=2, gpus_per_node=8, time="1-12:00:00", partition="all", account="me")
    path = written("slurm", spec(secrets={"SECRET": str(tmp_path / "key")}, setup="SETUP=1"), options, tmp_path)
    text = path.read_text()
    assert "s3cret" not in text
    for line in ("nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "time=1-12:00:00", "partition=all", "account=me", "requeue"):
        assert f"#SBATCH --{line}\n" in text
    # Nothing but comments before the last directive, or Slurm would not read it.
    head = text[: text.rindex("#SBATCH")].splitlines()
    assert all(line.startswith("#") for line in head)
    programs = {"srun": f"{NOTE}\nsys.exit({status})", "scontrol": NOTE}
    ended = shell(path, tmp_path, programs, SLURM_JOB_ID="7", SLURM_JOB_NAME="my-job")
    assert ended.returncode == status, ended.stderr
    (words, env), *more = calls(tmp_path)
    assert words[-len(WORDS) - 1 :] == [*WORDS, "--distributed=auto"] and words[-len(WORDS) - 2 :][0] == "lcx.cli"
    assert env == {"NASTY": NASTY, "SECRET": "s3cret"}
    assert [one for one, _ in more] == ([["requeue", "7"]] if again else [])


def test_slurm_requeues_so_often_and_no_more(tmp_path):
    path = written("slurm", spec(max_restarts=2), Slurm(nodes=1), tmp_path)
    programs = {"srun": "sys.exit(75)", "scontrol": NOTE}
    names = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "my-job"}
    assert shell(path, tmp_path, programs, **names, SLURM_RESTART_COUNT="1").returncode == 75
    assert len(calls(tmp_path)) == 1
    assert shell(path, tmp_path, programs, **names, SLURM_RESTART_COUNT="2").returncode == 75
    assert len(calls(tmp_path)) == 1


def test_slurm_with_an_image_runs_in_it(tmp_path):
    path = written("slurm", spec(image="host/lcx:1", mounts=(Mount("/scratch/a", "/mnt/b"),)), Slurm(nodes=1), tmp_path)
    shell(path, tmp_path, {"srun": NOTE})
    words = calls(tmp_path)[0][0]
    assert words[1:5] == ["--container-image=host/lcx:1", "--container-mounts=/scratch/a:/mnt/b", "lcx", "run"]


CLOUD = (
    NOTE
    + """
state = open(os.environ['STATE']).read().split()
if 'describe' in argv:
    if state[0] == 'ABSENT':
        sys.exit(1)
    print(state[0])
    open(os.environ['STATE'], 'w').write(' '.join(state[1:] or state))
if 'create' in argv or 'delete' in argv:
    open(os.environ['STATE'], 'w').write('WAITING_FOR_RESOURCES ACTIVE' if 'create' in argv else 'ABSENT')
words = ' '.join(argv)
step = 'copy' if 'scp' in argv else 'setup' if 'mountpoint' in words else 'run' if '.venv/bin:$PATH' in words else None
slices = open(os.environ['CALLS']).read().count('"create"')
failing, _, code = os.environ['CODES'].split(',')[max(slices, 1) - 1].rpartition(':')
if step == (failing or 'run'):
    code = int(code)
    if code == 255:
        open(os.environ['STATE'], 'w').write('SUSPENDED')
    sys.exit(code)
"""
)
"""A `gcloud` that gives slices, on which runs, or the steps that CODES name, end with CODES, and takes them away at 255."""


@pytest.fixture
def cloud(tmp_path):
    options = TpuVm("v6e", "4x4", "zone-a", "my-project", num_slices=2, spot=True)
    place = {"SECRET": "projects/p/secrets/s/versions/latest"}
    path = written("tpu_vm", spec(mounts=BUCKET, secrets=place), options, tmp_path)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "state").write_text("ABSENT")

    def run(codes):
        ended = shell(path, tmp_path, {"gcloud": CLOUD, "sleep": None}, STATE=str(tmp_path / "state"), CODES=codes)
        return ended, [words for words, _ in calls(tmp_path)]

    return run


def test_a_tpu_vm_script_asks_waits_readies_and_runs(cloud):
    ended, words = cloud("0")
    assert ended.returncode == 0 and "give the slices back" in ended.stdout, ended.stderr
    (create,) = [one for one in words if "create" in one]
    assert {
        "--node-count=2",
        "--node-prefix=my-job",
        "--accelerator-type=v6e-16",
        "--runtime-version=v2-alpha-tpuv6e",
        "--spot",
    } < set(create)
    ran = [one for one in words if "ssh" in one and any("lcx run" in word for word in one)]
    assert sorted(one[one.index("ssh") + 1] for one in ran) == ["my-job-0", "my-job-1"]
    command = next(word for word in ran[0] if word.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(command.replace("\\\n", ""))[-len(WORDS) - 1 :] == [*WORDS, "--distributed=auto"]
    assert f"export NASTY={shlex.quote(NASTY)}" in command and "gcloud secrets versions access" in command
    ready = next(word for one in words for word in one if "mountpoint" in word)
    assert "--only-dir=sub bucket /mnt/b" in ready
    for text in (command, ready.removeprefix("--command=")):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize("codes, copies", [("255,0", 4), ("copy:255,0", 3), ("setup:255,0", 4)])
def test_a_preempted_slice_is_asked_for_again(codes, copies, cloud):
    ended, words = cloud(codes)
    assert ended.returncode == 0 and "interrupted with status 255; starting again" in ended.stdout, ended.stderr
    assert len([one for one in words if "create" in one]) == 2 and len([one for one in words if "delete" in one]) == 1
    assert len([one for one in words if "scp" in one]) == copies  # none after one that failed


@pytest.mark.parametrize("codes", ["1", "copy:1", "setup:1"])
def test_a_mistake_is_not_tried_again(codes, cloud):
    ended, words = cloud(codes)
    assert ended.returncode == 1 and "fix the cause" in ended.stderr
    assert len([one for one in words if "create" in one]) == 1 and not [one for one in words if "delete" in one]
    assert any("lcx run" in word for one in words for word in one) == (codes == "1")


def test_a_jobset_has_the_words_the_slices_and_only_references(tmp_path):
    options = Gke("v5e", "4x4", num_slices=2, spot=True, namespace="team", queue="q", service_account="runner")
    job = spec(image="host/lcx:1", mounts=(*BUCKET, Mount("pvc/data", "/data")), secrets={"SECRET": "wandb/key"})
    found = yaml.safe_load(written("gke", job, options, tmp_path).read_text())
    assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and found["metadata"]["namespace"] == "team"
    (slices,) = found["spec"]["replicatedJobs"]
    per_slice = slices["template"]["spec"]
    pod = per_slice["template"]["spec"]
    (container,) = pod["containers"]
    assert (slices["replicas"], per_slice["parallelism"], per_slice["completions"]) == (2, 4, 4)
    # Kubernetes expands $(NAME), and takes $$( for $(.
    assert [word.replace("$$(", "$(") for word in container["command"]] == ["lcx", *WORDS, "--distributed=auto"]
    env = {one["name"]: one for one in container["env"]}
    assert env["NASTY"]["value"].replace("$$(", "$(") == NASTY
    assert env["SECRET"]["valueFrom"]["secretKeyRef"] == {"name": "wandb", "key": "key"}
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert [one["mountPath"] for one in container["volumeMounts"]] == ["/mnt/b", "/data"]
    attributes = {"bucketName": "bucket", "mountOptions": "implicit-dirs,only-dir=sub"}
    # Without it a pod on the host's network would mount as its node, not as its service account.
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {**attributes, "hostNetworkPodKSA": "true"}
    plain = yaml.safe_load(written("gke", job, Gke("v5e", "4x4"), tmp_path).read_text())
    (node,) = plain["spec"]["replicatedJobs"]
    assert node["template"]["spec"]["template"]["spec"]["volumes"][0]["csi"]["volumeAttributes"] == attributes
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 10


@pytest.mark.parametrize("accelerators", ["H100:8", "tpu-v6e-8"])
def test_a_task_of_skypilot(accelerators, tmp_path):
    options = SkyPilot(nodes=2, accelerators=accelerators, infra="gcp/us-central1", spot=True)
    path = written("skypilot", spec(mounts=BUCKET, secrets={"SECRET": "SECRET"}), options, tmp_path)
    found = yaml.safe_load(path.read_text())
    # Codes to recover on are not counted, and errors that are counted would include status 1.
    assert found["resources"]["job_recovery"] == {"recover_on_exit_codes": [143]}
    assert found["secrets"] == {"SECRET": None} and found["envs"]["NASTY"] == NASTY
    assert found["file_mounts"] == {"/mnt/b": {"source": "gs://bucket/sub", "mode": "MOUNT"}}
    script = tmp_path / "run.sh"
    script.write_text(found["run"])
    names = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    assert shell(script, tmp_path, {"lcx": NOTE}, **names).returncode == 0
    start = ["--distributed=auto"]
    if accelerators == "H100:8":
        start = ["--distributed=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]
    assert calls(tmp_path)[0][0] == [*WORDS, "--max_restarts=10", *start]
    assert subprocess.run(["bash", "-n"], input=found["setup"], text=True).returncode == 0
    words = BACKENDS["skypilot"].submit(spec(secrets={"SECRET": "SECRET"}), options, path)
    assert words[:3] == ["sky", "jobs", "launch"] and words[-3:-1] == ["--secret", "SECRET"]
    once = yaml.safe_load(written("skypilot", spec(mounts=BUCKET, max_restarts=0), options, tmp_path).read_text())
    assert "job_recovery" not in once["resources"]


REFUSED = [
    ("gke", {}, Gke("v5e", "4x4"), "--backend=gke needs --image"),
    ("gke", {"image": "a", "mounts": ()}, Gke("v5e", "4x4"), "would be a folder of its own on each of 4 hosts"),
    ("gke", {"image": "a", "mounts": (Mount("/a", "/mnt/b"),)}, Gke("v5e", "1x1"), "its sources begin with gs:// or pvc/"),
    (
        "gke",
        {"image": "a", "mounts": BUCKET, "secrets": {"A": "b"}},
        Gke("v5e", "1x1"),
        "must name a secret of the cluster and a key",
    ),
    ("slurm", {"mounts": (Mount("/a", "/b"),)}, Slurm(1), "without --image a job of Slurm sees the cluster's file systems"),
    ("slurm", {"secrets": {"A": "b"}}, Slurm(1), "must name a file that only you can read"),
    ("tpu_vm", {"secrets": {"A": "b"}}, TpuVm("v5e", "1x1", "z", "p"), "must name a version in Secret Manager"),
    ("tpu_vm", {"mounts": ()}, TpuVm("v5e", "1x1", "z", "p", num_slices=2), "folder of its own on each of 2 hosts"),
    ("skypilot", {"secrets": {"A": "b"}, "mounts": BUCKET}, SkyPilot(1, "H100:8"), "export A and write --secret=A=A"),
    ("skypilot", {}, SkyPilot(2, "H100:8"), "folder of its own on each of 2 hosts"),
    # One host is enough to lose all where its disk ends with the job.
    ("skypilot", {}, SkyPilot(1, "H100:8"), "would be lost with the node, .* add --mount=gs://BUCKET:/mnt/bucket"),
    ("gke", {"image": "a"}, Gke("v5e", "1x1"), "would be lost with the pod"),
    ("gke", {"image": "a", "mounts": (Mount("pvc/a", "/data"),)}, Gke("v5e", "1x1"), "would be lost with the pod"),
    ("tpu_vm", {"image": "a"}, TpuVm("v5e", "1x1", "z", "p"), "would be lost with the container"),
    ("slurm", {"image": "a"}, Slurm(1), "would be lost with the container, .* add --mount=/scratch/me:/scratch and"),
    ("slurm", {"image": "a"}, Slurm(2), "folder of its own on each of 2 hosts"),
]


@pytest.mark.parametrize("backend, values, options, answer", REFUSED)
def test_what_a_platform_cannot_do_is_refused(backend, values, options, answer):
    with pytest.raises(UserError, match=answer):
        BACKENDS[backend].files(spec(**values), options)


def test_a_disk_that_stays_may_hold_the_workdir():
    assert BACKENDS["tpu_vm"].files(spec(), TpuVm("v5e", "1x1", "z", "p"))
    assert BACKENDS["slurm"].files(spec(), Slurm(2))
    assert BACKENDS["gke"].files(spec(image="a", workdir=None), Gke("v5e", "1x1"))


def test_values_that_could_break_a_directive_are_refused():
    for values in ({"partition": "a b"}, {"account": "x\n#SBATCH --uid=0"}, {"time": "soon"}, {"gpus_per_node": 0}):
        with pytest.raises(UserError):
            Slurm(nodes=1, **values)
    with pytest.raises(UserError, match="--zone=a; rm holds characters"):
        TpuVm("v5e", "1x1", "a; rm", "p")
    with pytest.raises(UserError, match="--spot and --reserved exclude each other"):
        TpuVm("v5e", "1x1", "z", "p", spot=True, reserved=True)


def test_options_of_other_backends_and_missing_ones_are_named():
    with pytest.raises(UserError, match="--zone belongs to --backend=tpu_vm, not to --backend=slurm; leave it out"):
        options_of("slurm", {"nodes": 2, "zone": "a"})
    with pytest.raises(UserError, match="--backend=tpu_vm needs --topology, --zone, --project; see"):
        options_of("tpu_vm", {"tpu": "v5e"})
    assert list(OPTIONS) == ["local", "tpu_vm", "gke", "slurm", "skypilot"]


def test_what_a_backend_would_ignore_is_refused():
    for backend, values, answer in (
        ("local", {"image": "a"}, "--image gives an image, which --backend=local does not take"),
        ("local", {"mounts": BUCKET}, "--mount gives mounts, which --backend=local does not take"),
        ("local", {}, "--env gives variables, which --backend=local does not take"),
        ("gke", {"setup": "x"}, "--setup gives a setup, which --backend=gke does not take"),
        ("slurm", {"image": "a", "setup": "x"}, "give one of them"),
    ):
        with pytest.raises(UserError, match=answer):
            refuse_ignored(backend, spec(**values))


def test_a_tool_that_is_missing_or_refuses_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--backend=slurm needs sbatch, which is not on the PATH of this machine"):
        launch("slurm", [spec()], Slurm(1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tool := tmp_path / "sbatch").write_text(f"#!{shutil.which('sh', path='/bin')}\nexit 3\n")
    tool.chmod(0o755)
    with pytest.raises(UserError, match=r"sbatch did not take the job \(status 3"):
        launch("slurm", [spec()], Slurm(1), tmp_path / "out")
    tool.write_text(f"#!{shutil.which('sh', path='/bin')}\nexit 0\n")
    assert launch("slurm", [spec(), spec(name="other")], Slurm(1), tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["my-job.sbatch", "other.sbatch"]


@pytest.mark.parametrize("backend", ["slurm", "tpu_vm"])
def test_shellcheck_has_nothing_to_say(backend, tmp_path):
    if (tool := shutil.which("shellcheck")) is None:
        pytest.skip("shellcheck is not installed")
    options = Slurm(2) if backend == "slurm" else TpuVm("v5e", "4x4", "z", "p", num_slices=2)
    for image in (None, "host/lcx:1"):
        mounts = BUCKET if backend == "tpu_vm" else (Mount("/scratch", "/mnt/b"),) if image else ()
        path = written(backend, spec(mounts=mounts, image=image), options, tmp_path)
        # A dollar sign in single quotes is meant.
        ended = subprocess.run([tool, "--exclude=SC2016", str(path)], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout
