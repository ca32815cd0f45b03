"""A run killed at any moment and started again ends as one that was never interrupted."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemmaqat.training.checkpoint import committed_steps

NUM_STEPS = 40
KILLS = 20


class Runs:
    """The process that forks runs, and what became of them."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", Path(__file__).with_name("forked_runs.py"),
             str(NUM_STEPS), str(folder / "cache")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    def start(self, name):
        """Starts (again) the run of this name; returns its process id."""
        self.process.stdin.write(f"{self.folder / name} {self.folder / name}.hash\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """The exit status; negative for a signal."""
        return int(self.process.stdout.readline())

    def ended(self, name):
        """Parameter hash and metrics of a run that came to its end."""
        metrics = (self.folder / name / "metrics.jsonl").read_text()
        return (self.folder / f"{name}.hash").read_text(), metrics

    def close(self):
        self.process.communicate()  # closes its standard input, which ends it


@pytest.fixture
def runs(tmp_path):
    runs = Runs(tmp_path)
    yield runs
    runs.close()


def _until(condition, limit=60):
    """Waits until the condition holds, or for `limit` seconds."""
    end = time.monotonic() + limit
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)


def _choose_a_moment(kind, folder, rng):
    """Waits for one of the kinds of moments at which a process may die."""
    before = max(committed_steps(folder), default=0)
    if kind == 0:  # start, restore, compilation
        time.sleep(rng.uniform(0, 2.0))
        return
    _until(lambda: max(committed_steps(folder), default=0) > before)
    if kind == 1:  # some steps and saves later
        time.sleep(rng.uniform(0, 0.1))
    else:  # during a save
        _until(lambda: any(folder.glob(".saving-*")))
        time.sleep(rng.uniform(0, 0.01))


def test_killed_and_resumed_equals_never_interrupted(runs):
    assert runs.start("reference") and runs.wait() == 0
    reference = runs.ended("reference")
    rng = random.Random(0)
    kills, life, in_save = 0, 0, 0
    while kills < KILLS:
        name = f"killed{life}"  # a run that ends before the last kill is followed by another
        folder = runs.folder / name / "checkpoints"
        while True:
            child = runs.start(name)
            if kills < KILLS:
                _choose_a_moment(kills % 4, folder, rng)
                os.kill(child, signal.SIGKILL)
            status = runs.wait()
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills += 1
            in_save += bool(list(folder.glob(".saving-*")))
        assert runs.ended(name) == reference
        life += 1
    print(f"{kills} kills over {life} runs, {in_save} during a save")
    assert in_save  # otherwise the test has not met what it is about
