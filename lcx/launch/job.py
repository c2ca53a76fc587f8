"""What a launch starts: a command of lcx with its folder, environment, mounts and secrets, all of them by reference."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lcx.core import exits
from lcx.core.errors import UserError

LONGEST_NAME = 40
"""Characters of a job's name: Kubernetes makes names of pods of it, which have at most 63."""

RETRY_STATUSES = (exits.RESTART, exits.PREEMPTED)
"""Exit statuses of a run that goes on from its last checkpoint when started again."""

BUCKETS = ("gs://", "s3://", "r2://", "az://")


@dataclasses.dataclass(frozen=True)
class Mount:
    """A `source` outside the host, as the platform names it, that the command sees as the folder `target`."""

    source: str
    target: str


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """A command of lcx to start on every host.

    `words` are the command's name and flags, without those that say how processes find each other. `workdir` is the folder of the
    run, None for a command without one. `env` maps names to values that may be read by anyone, `secrets` names to where the
    platform keeps the value. `setup` is a shell command that readies a host. A run is started again at most `max_restarts` times.
    """

    name: str
    words: tuple[str, ...]
    workdir: str | None = None
    image: str | None = None
    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    setup: str | None = None
    max_restarts: int = 10

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[a-z]([a-z0-9-]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", self.name):
            raise UserError(
                f"--name={self.name} cannot name a job; use up to {LONGEST_NAME} small letters, digits and hyphens, a letter first"
            )
        if self.max_restarts < 0:
            raise UserError(f"--max_restarts={self.max_restarts} must not be negative")
        texts = {"image": self.image, "setup": self.setup, "workdir": self.workdir}
        for flag, text in texts.items():
            if text is not None:
                printable(flag, text)
        for word in self.words:
            printable("config" if word.startswith("--config") else "words", word)

    @property
    def targets(self) -> list[str]:
        """The folders that mounts make."""
        return [mount.target for mount in self.mounts]


@dataclasses.dataclass(frozen=True)
class Backend:
    """A platform that starts jobs from files of its own kind.

    `tool` is the program that takes the files, `options` the dataclass of the platform's own settings. `takes` are the fields of a
    `JobSpec` among image, mounts, env, secrets and setup that it can honour. `files` gives name -> content, first the file that the
    tool takes; `submit` the command line that starts the job, given the path of that file.
    """

    tool: str
    options: type
    takes: frozenset[str]
    files: Callable[[JobSpec, Any], dict[str, str]]
    submit: Callable[[JobSpec, Any, Path], list[str]]


def named(flag: str, items: Sequence[str], what: str) -> dict[str, str]:
    """`NAME=VALUE` items of a repeated flag by name; raises `UserError` for other items and for a name that comes twice."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not value:
            raise UserError(f"--{flag}={item} is not of the form NAME={what.upper()}; write for example --{flag}=MY_NAME={what}")
        if name in found:
            raise UserError(f"--{flag}={name}=... is given twice; give each name once")
        found[name] = printable(flag, value)
    return found


def environment(items: Sequence[str]) -> dict[str, str]:
    """The variables of `--env`; raises `UserError` for one whose name says that its value is secret."""
    found = named("env", items, "value")
    for name in found:
        if re.search(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", name.upper()):
            raise UserError(
                f"--env={name}=... would write its value into a file; give --secret={name}=WHERE, which names where the "
                "platform keeps it"
            )
    return found


def mounts(items: Sequence[str]) -> tuple[Mount, ...]:
    """`SOURCE:TARGET` items of `--mount`; raises `UserError` for other items and for a target that comes twice."""
    found = []
    for item in items:
        source, colon, target = printable("mount", item).rpartition(":")
        if not colon or not source or not target.startswith("/") or target[1:2] in ("", "/") or source.endswith(":"):
            raise UserError(
                f"--mount={item} is not of the form SOURCE:/FOLDER; write for example --mount=gs://my-bucket:/mnt/bucket"
            )
        found.append(Mount(source, str(PurePosixPath(target))))
    targets = [mount.target for mount in found]
    for target in targets:
        if targets.count(target) > 1:
            raise UserError(f"--mount=...:{target} is given twice; give each folder one source")
    return tuple(found)


def printable(flag: str, text: str) -> str:
    """`text` if it can stand in one line of a file; raises `UserError` for line ends and other control characters."""
    if bad := re.search(r"[\x00-\x1f\x7f\u2028\u2029\x85]", text):
        raise UserError(f"--{flag}={text!r} holds the control character {bad[0]!r}; leave it out")
    return text


def plain_word(flag: str, text: str | None) -> None:
    """Raises `UserError` for a value that a platform's names and directives cannot hold, as one with blanks or quotes."""
    if text is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:/@+,=\[\]-]*", text):
        raise UserError(f"--{flag}={text} holds characters other than letters, digits and _.:/@+,=[]-; correct it")


def at_least(flag: str, value: int | None, least: int) -> None:
    """Raises `UserError` for a number below `least`."""
    if value is not None and value < least:
        raise UserError(f"--{flag}={value} must be at least {least}")


def job_name(text: str) -> str:
    """A name for a job made of any text; one that has to be cut or is changed much ends in a hash, so that names stay apart."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not plain or not plain[0].isalpha():
        plain = f"lcx-{plain}".rstrip("-")
    if len(plain) <= LONGEST_NAME and plain == re.sub(r"[_/. ]", "-", text.lower()):
        return plain
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{plain[: LONGEST_NAME - 7].rstrip('-')}-{digest}"


def default_setup(extra: str) -> str:
    """A shell command that installs the copied lcx with its pinned libraries under a Python of its own, whatever the host has."""
    uv = "python3 -m pip install --quiet --user uv && PATH=$HOME/.local/bin:$PATH"
    return (
        f"{uv} && {{ test -d .venv || uv venv --quiet --python 3.12 .venv; }} && "
        f"uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[{extra}]'"
    )


def refuse_own_disks(job: JobSpec, hosts: int, ends: str | None = None, mount: str = "gs://BUCKET:/mnt/bucket") -> None:
    """Raises `UserError` where several hosts would keep a run's checkpoints each on its own disk, or one on a disk that is lost.

    `ends`: with what the disks of hosts end, as "the pod"; None: they stay. `mount` is an example of a `--mount` that helps.
    """
    if job.workdir is None or (hosts < 2 and ends is None):
        return
    place = PurePosixPath(job.workdir)
    if not any(place.is_relative_to(target) for target in job.targets):
        what = f"a folder of its own on each of {hosts} hosts" if hosts > 1 else f"lost with {ends}"
        why = "one that all see" if hosts > 1 else "one that stays"
        raise UserError(
            f"--workdir={job.workdir} would be {what}, but a run keeps its checkpoints in {why}; "
            f"add --mount={mount} and a --workdir under {mount.rpartition(':')[2]}"
        )


def refuse_sources(job: JobSpec, backend: str, allowed: Sequence[str], example: str) -> None:
    """Raises `UserError` for a mount whose source begins with none of `allowed`."""
    for mount in job.mounts:
        if not mount.source.startswith(tuple(allowed)):
            kinds = " or ".join(allowed)
            raise UserError(
                f"--mount={mount.source}:{mount.target} names a source that --backend={backend} cannot mount; its sources begin "
                f"with {kinds}, as in --mount={example}"
            )
