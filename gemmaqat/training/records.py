"""What a run writes while it goes: metrics.jsonl, timing.jsonl, TensorBoard events.

`metrics.jsonl` is the record and holds only what a repeated run would give again, bit by bit.
Wall-clock rates go to `timing.jsonl`.
"""

import json
import os
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"


class Records:
    """Appends to the record files of one work directory."""

    def __init__(self, workdir: Path, *, step: int, tensorboard: bool) -> None:
        """Opens the files, cutting them back to `step`.

        Args:
            workdir: folder of the run.
            step: the last step whose lines stay (that of the checkpoint the run resumes from).
            tensorboard: also write events under `workdir/tensorboard`.
        """
        cut_back(workdir / METRICS, step)
        cut_back(workdir / TIMING, step)
        self._metrics = (workdir / METRICS).open("a")
        self._timing = (workdir / TIMING).open("a")
        self._board = _summary_writer(workdir, step) if tensorboard else None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl: `step` and flat names."""
        self._write(self._metrics, step, values)

    def timing(self, step: int, values: dict[str, float]) -> None:
        """One line of timing.jsonl."""
        self._write(self._timing, step, values)

    def sync(self) -> None:
        """Returns once the metrics are on the disk, safe from a power cut."""
        os.fsync(self._metrics.fileno())

    def _write(self, file: Any, step: int, values: dict[str, float]) -> None:
        # Flushed whole: a killed process leaves at most one torn line, beyond its checkpoint.
        file.write(json.dumps({"step": step} | values) + "\n")
        file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
        self._timing.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path, *, last_step: int | None = None) -> list[dict[str, Any]]:
    """The complete lines of a metrics file up to `last_step`; a torn last line is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # text after the last newline is a torn line
    records = [json.loads(line) for line in lines]
    return [r for r in records if last_step is None or r["step"] <= last_step]


def cut_back(path: Path, step: int) -> None:
    """Drops every line beyond `step`, atomically."""
    if path.exists():
        write_atomically(
            path,
            "".join(json.dumps(record) + "\n" for record in read_metrics(path, last_step=step)),
        )


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole: readers see the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _summary_writer(workdir: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError(
            "config.train.tensorboard: needs the package tensorboardX, which is not installed; "
            "run `pip install 'gemmaqat[tensorboard]'` or set train.tensorboard=False."
        ) from None
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)
