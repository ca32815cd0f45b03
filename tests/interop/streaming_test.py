"""Real sizes on a small machine: a cap on private memory holds for the whole run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(
        command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True
    ).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, cap_mib, gigabytes", [("e2b", 1536, "2.63"), ("31b", 4096, "17.28")]
)
def test_a_whole_checkpoint_is_written_under_the_cap(size, cap_mib, gigabytes, tmp_path):
    run("random_checkpoint.py", f"--size={size}", f"--folder={tmp_path / size}", "--sparse")
    row = run(
        "streaming_export.py",
        f"--checkpoint={tmp_path / size}",
        "--recipe=q4_0_emb",
        "--sink",
        f"--cap_mib={cap_mib}",
    )
    assert f"| {gigabytes} | {cap_mib} |" in row
