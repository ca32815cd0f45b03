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
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture
def runs(tmp_path):
    runs = Runs(tmp_path)
    yield runs
    runs.close()


def _until_next_checkpoint(folder, before, limit):
    """Waits until a step beyond `before` is committed, or for `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if max(committed_steps(folder), default=0) > before:
            return
        time.sleep(0.002)


def test_killed_and_resumed_equals_never_interrupted(runs):
    assert runs.start("reference") and runs.wait() == 0
    reference = runs.ended("reference")
    rng = random.Random(0)
    kills, life, in_save, from_the_start = 0, 0, 0, 0
    while kills < KILLS:
        name = f"killed{life}"  # a run that ends before the last kill is followed by another
        folder = runs.folder / name / "checkpoints"
        while True:
            child = runs.start(name)
            if kills < KILLS:
                before = max(committed_steps(folder), default=0)
                if kills % 5:
                    _until_next_checkpoint(folder, before, limit=60)
                    time.sleep(rng.uniform(0, 0.08))  # a few steps and saves
                else:
                    time.sleep(rng.uniform(0, 2.0))  # start, restore, compilation
                os.kill(child, signal.SIGKILL)
            status = runs.wait()
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills += 1
            in_save += bool(list(folder.glob(".saving-*")))
            from_the_start += not committed_steps(folder)
        assert runs.ended(name) == reference
        life += 1
    print(f"{kills} kills over {life} runs, {in_save} during a save")
    # Otherwise the test has not met what it is about.
    assert in_save >= KILLS // 4
