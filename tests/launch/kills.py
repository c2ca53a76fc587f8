"""A run of several processes, one of which gets a signal at random moments; it ends, resumes, and ends as one left alone.

    python -m tests.launch.kills --number=100 --signal=SIGKILL --processes=2 --seed=0 --folder=/tmp/kills

A run is killed up to `--each` times before it may finish. Prints a line for every kill, and a summary as JSON; exits with 1 if
anything was not as it should be.
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

import psutil

from lcx.core import exits
from lcx.training.metrics import TIMING
from tests.launch import job

CONFIG = Path(__file__).parent / "sixty.py"
STEPS, EVERY = 60, 10
"""Steps of the run, and how many there are from one checkpoint to the next."""

SILENCE = 15.0
WITHIN, START = 60.0, 240.0
"""Seconds in which all processes of a job end after the signal, and in which they must have started: before it has joined a job, a
process that is killed is one that has not come yet."""

EXPECTED = {"SIGKILL": exits.RESTART, "SIGTERM": exits.PREEMPTED, "SIGSTOP": exits.RESTART}


class Runs:
    """The workdirs of a test, and the processes that work in them."""

    def __init__(self, folder, processes):
        self.folder, self.processes = folder, processes

    def start(self, name, attempt, cold):
        """All processes of a job that runs or resumes `name`, with the time; `cold`: with no programs but its own."""
        words = ["run", f"--config={CONFIG}", f"--workdir={self.folder / name}"]
        logs = self.folder / f"{name}.logs" / str(attempt)
        flags = {"heartbeat_timeout": SILENCE, "initialization_timeout": START}
        programs = self.folder / ("compiled" if not cold else f"{name}/compiled")
        return job.lcx(words, self.processes, logs, programs=programs, **flags), logs, time.time()

    def rows(self, name):
        """The rows of metrics of a run, without what differs between two runs; and the rows of its evaluation."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        kept = [{key: x for key, x in json.loads(line).items() if key not in TIMING} for line in lines]
        return kept, json.loads((self.folder / name / "eval" / "after.json").read_text())["rows"]

    def left_alone(self):
        """Seconds to the first step of the run that gets no signal, which is done once for all tests in the folder."""
        known = self.folder / "first_step.json"
        if not known.exists():
            shutil.rmtree(self.folder / "alone", ignore_errors=True)
            started, logs, begun = self.start("alone", 0, cold=False)
            assert set(job.ended(started)) == {0}, job.said(logs, 0)[-2000:]
            known.write_text(json.dumps(self.first_step("alone", begun)))
        return json.loads(known.read_text())

    def first_step(self, name, begun):
        """Seconds from `begun` to the end of the first step after it; None if there was none."""
        path = self.folder / name / "metrics.jsonl"
        times = [json.loads(line)["time"] for line in path.read_text().splitlines()]
        return next((t - begun for t in times if t > begun), None)


def computing(process):
    """The process that computes, below its supervisor; None while there is none."""
    try:
        found = psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return None
    return found[0] if found else None


def moment(workdir, first_step, rng):
    """A function that says whether a random moment has come: in the start, in a step, in a save, or in the evaluation."""
    begun, path = time.time(), workdir / "metrics.jsonl"
    kind = rng.choices(("start", "step", "save", "evaluation"), (2, 5, 2, 2))[0]
    if kind == "start":
        after = rng.uniform(0.05, 1.0) * first_step
        return kind, lambda: time.time() - begun > after
    rows = path.read_bytes().count(b"\n") if path.exists() else 0
    if kind == "evaluation" or rows >= STEPS - 1:
        after, seen = rng.uniform(0.0, first_step / 4), []

        def evaluated():
            if not seen and (workdir / "checkpoints" / str(STEPS)).exists():
                seen.append(time.time())
            return bool(seen) and time.time() - seen[0] > after

        return "evaluation", evaluated
    wanted = rng.randrange(rows + 1, STEPS)
    if kind == "save":
        wanted = min(STEPS, -(-wanted // EVERY) * EVERY)
    after = rng.uniform(0.0, 0.3)

    def reached():
        if not path.exists() or path.read_bytes().count(b"\n") < wanted:
            return False
        time.sleep(after)
        return True

    return kind, reached


def strike(started, number, come, rng):
    """Send the signal to one of the processes when the moment has come; returns which, or None if the job ended before."""
    while not come():
        if any(process.poll() is not None for process in started):
            return None
        time.sleep(0.01)
    chosen = rng.randrange(len(started))
    target = computing(started[chosen])
    if target is None or any(process.poll() is not None for process in started):
        return None
    target.send_signal(number)
    return chosen


def reason(logs, processes):
    """The errors that the processes have printed, one a line."""
    lines = [line for process in range(processes) for line in job.said(logs, process).splitlines()]
    return [line for line in lines if line.startswith("error:")]


def main(argv=None):
    """Run the test; returns the summary."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=10)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--signal", choices=list(EXPECTED), default="SIGKILL")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    chosen = parser.parse_args(argv)
    rng, number, processes = random.Random(chosen.seed), getattr(signal, chosen.signal), chosen.processes
    runs = Runs(chosen.folder, processes)
    started_in = runs.left_alone()
    expected = runs.rows("alone")
    print(f"left alone, first step after {started_in:.0f} s", flush=True)
    struck, wrong, starts, ends, run = 0, [], [], [], 0
    while struck < chosen.number:
        name, attempt, hits, cold = f"{chosen.signal}-{chosen.seed}-{run}", 0, 0, rng.random() < 0.25
        shutil.rmtree(chosen.folder / name, ignore_errors=True)
        while True:
            started, logs, begun = runs.start(name, attempt, cold)
            attempt += 1
            kind, come = moment(chosen.folder / name, started_in, rng)
            hit = strike(started, number, come, rng) if struck < chosen.number and hits < chosen.each else None
            at = time.time()
            if hit is None:
                codes = job.ended(started)
                if codes != [0] * processes:
                    wrong.append(f"{name}: undisturbed, it ended with {codes}: {reason(logs, processes)}")
                break
            struck, hits = struck + 1, hits + 1
            codes, seconds = job.ended(started), time.time() - at
            said = reason(logs, processes)
            print(f"{struck}: process {hit}, {kind}, {at - begun:.1f} s: {codes} in {seconds:.1f} s", *said, sep="\n  ", flush=True)
            ends.append(seconds)
            if set(codes) - {EXPECTED[chosen.signal], 0} or seconds > (START + WITHIN if at - begun < started_in else WITHIN):
                wrong.append(f"{name}, kill {struck}: {codes} after {seconds:.1f} s")
            if chosen.signal != "SIGTERM" and not any(f"process {hit}" in line or "gone" in line for line in said):
                wrong.append(f"{name}, kill {struck}: no reason: {said}")
            if (first := runs.first_step(name, begun) if (chosen.folder / name / "metrics.jsonl").exists() else None) is not None:
                starts.append(first)
        if runs.rows(name) != expected:
            wrong.append(f"{name}: not the metrics of the run that was left alone")
        run += 1
    summary = {
        "signal": chosen.signal, "kills": struck, "runs": run, "wrong": wrong, "slowest_end": max(ends),
        "median_end": statistics.median(ends), "median_first_step": statistics.median(starts) if starts else None,
        "first_step_of_a_fresh_run": started_in,
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    return summary


if __name__ == "__main__":
    sys.exit(bool(main()["wrong"]))
