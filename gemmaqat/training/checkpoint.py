"""Checkpoints: Orbax writes the arrays, a manifest of checksums of ours says whether to trust them.

A checkpoint is the folder `checkpoints/00000040`:

    arrays/            Orbax: params/<path>, optimizer/<path>, rng
    checkpoint.json    format_version, step, hold-out metric
    data_state.json    where the data loader stands
    model.json         the model's config
    quantization.json  the resolved table (null for a float run)
    manifest.json      size and SHA-256 of every file above

It is written under a hidden name in the background, the manifest last, and renamed when all of it
is on the disk. The rename is the commit: what has no final name was never finished. The checksums
are needed besides, because Orbax restores a flipped bit in silence.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

FORMAT_VERSION = 1
FOLDER = "checkpoints"

_MANIFEST = "manifest.json"
_SAVING, _REMOVING = ".saving-", ".removing-"


@dataclasses.dataclass(frozen=True)
class Saved:
    """One committed checkpoint, checked against its manifest.

    Attributes:
        folder: where it lies, absolute (Orbax takes nothing else).
        step: optimizer steps done.
        metric: hold-out loss of these parameters, if it was taken.
        data_state: position of the data loader, plain JSON values.
        model: the model's config as plain JSON values.
        quantization: the resolved table as plain JSON values; None for a float run.
    """

    folder: Path
    step: int
    metric: float | None
    data_state: Any
    model: dict[str, Any]
    quantization: dict[str, Any] | None

    def arrays(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The arrays of the given names, with the given shapes, dtypes and shardings.

        Raises:
            ValueError: an array is missing or has another shape.
        """
        target = dict(abstract)
        _quiet_orbax()
        with ocp.PyTreeCheckpointer() as orbax:
            found = orbax.metadata(self.folder / "arrays").item_metadata.tree
            for name, wanted in target.items():
                shape = tuple(found[name].shape) if name in found else None
                if shape != tuple(wanted.shape):
                    raise ValueError(
                        f"{self.folder}: {name} has shape {shape}, expected {wanted.shape}; "
                        "use the config the checkpoint was made with."
                    )
            restore = ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            )
            return orbax.restore(self.folder / "arrays", args=restore)


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, the last ones and the best ones kept."""

    def __init__(self, folder: Path, *, keep_last: int, keep_best: int) -> None:
        """Opens the folder; leftovers of interrupted saves and removals are cleared away."""
        self.folder = folder = folder.absolute()
        self.keep_last, self.keep_best = keep_last, keep_best
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        _quiet_orbax()
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.glob(f"{_SAVING}*"), *folder.glob(f"{_REMOVING}*")]:
            shutil.rmtree(leftover)

    def save(
        self,
        step: int,
        arrays: Mapping[str, jax.Array],
        *,
        metric: float | None,
        data_state: Any,
        model: dict[str, Any],
        quantization: dict[str, Any] | None,
    ) -> None:
        """Starts a save and returns once the arrays may be donated; an earlier save ends first."""
        self.wait()
        draft = self.folder / f"{_SAVING}{step:08d}"
        draft.mkdir()
        # Orbax holds references to the buffers it still reads, and a donated buffer with another
        # reference is copied by the runtime, not reused.
        self._orbax.save(draft / "arrays", args=ocp.args.PyTreeSave(dict(arrays)))
        about = {"format_version": FORMAT_VERSION, "step": step, "metric": metric}
        for name, value in (
            ("checkpoint.json", about),
            ("data_state.json", data_state),
            ("model.json", model),
            ("quantization.json", quantization),
        ):
            (draft / name).write_text(json.dumps(value, indent=1))
        self._thread = threading.Thread(target=self._finish, args=(draft, step), daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save under way; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits, then frees Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def latest(self) -> Saved | None:
        """The newest intact checkpoint; corrupt ones are named in the log and set aside.

        Raises:
            ValueError: every checkpoint is corrupt, or the newest is of a newer format.
        """
        saved, problems = newest_intact(self.folder)
        for step, problem in problems.items():
            aside = f"corrupt-{step:08d}"
            logging.error("%s Going back to an earlier one; it is kept as %s.", problem, aside)
            if (self.folder / aside).exists():
                _remove(self.folder / aside)
            step_folder(self.folder, step).rename(self.folder / aside)
        return saved

    def _finish(self, draft: Path, step: int) -> None:
        try:
            self._orbax.wait_until_finished()
            _write_manifest(draft)
            draft.rename(step_folder(self.folder, step))
            _sync(self.folder)
            self._prune()
        except BaseException as error:  # raised again in the loop's thread by wait()
            self._error = error

    def _prune(self) -> None:
        steps = committed_steps(self.folder)
        metrics = {step: _metric(step_folder(self.folder, step)) for step in steps}
        taken = {step: metric for step, metric in metrics.items() if metric is not None}
        best = sorted(taken, key=taken.__getitem__)
        kept = {*steps[-self.keep_last :], *best[: self.keep_best]}
        for step in set(steps) - kept:
            _remove(step_folder(self.folder, step))


class CorruptCheckpoint(ValueError):
    """A committed checkpoint whose files are not those that were written."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of one step lies."""
    return folder / f"{step:08d}"


def committed_steps(folder: Path) -> list[int]:
    """Steps that have a committed checkpoint, ascending, whether intact or not."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def best_step(folder: Path) -> int | None:
    """The step with the smallest hold-out metric; None where none was taken."""
    metrics = {step: _metric(step_folder(folder, step)) for step in committed_steps(folder)}
    taken = {step: metric for step, metric in metrics.items() if metric is not None}
    return min(taken, key=taken.__getitem__) if taken else None


def newest_intact(folder: Path) -> tuple[Saved | None, dict[int, str]]:
    """The newest checkpoint whose checksums hold, and what is wrong with each newer one by step.

    Raises:
        ValueError: there are checkpoints and every one is corrupt.
    """
    problems: dict[int, str] = {}
    for step in reversed(committed_steps(folder)):
        try:
            return read(step_folder(folder, step)), problems
        except CorruptCheckpoint as error:
            problems[step] = str(error)
    if problems:
        raise ValueError(
            f"{folder}: no checkpoint is intact: {' '.join(problems.values())} Restore one from a "
            "copy, or start again in another work directory."
        )
    return None, {}


def read(folder: Path) -> Saved:
    """Checks one checkpoint against its manifest and reads everything but its arrays.

    Raises:
        CorruptCheckpoint: a file is missing, or differs from what was written.
        ValueError: it has a newer format.
    """
    folder = folder.absolute()
    _verify(folder)
    about = json.loads((folder / "checkpoint.json").read_text())
    if about["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{folder}: format_version is {about['format_version']}, this version reads up to "
            f"{FORMAT_VERSION}; use a newer gemmaqat."
        )
    return Saved(
        folder=folder,
        step=about["step"],
        metric=about["metric"],
        data_state=json.loads((folder / "data_state.json").read_text()),
        model=json.loads((folder / "model.json").read_text()),
        quantization=json.loads((folder / "quantization.json").read_text()),
    )


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        files[str(path.relative_to(folder))] = _fingerprint(path)
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps(files, indent=1))
    _sync(manifest)


def _verify(folder: Path) -> None:
    manifest = folder / _MANIFEST
    try:
        files = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{manifest}: cannot be read ({error}).") from None
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{path}: missing from the checkpoint.")
        if _fingerprint(path) != wanted:
            raise CorruptCheckpoint(f"{path}: size or checksum differs from the manifest.")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _remove(folder: Path) -> None:
    """Renames first: a removal that is interrupted must not look like a corrupt checkpoint."""
    doomed = folder.with_name(f"{_REMOVING}{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _metric(folder: Path) -> float | None:
    try:
        return json.loads((folder / "checkpoint.json").read_text())["metric"]
    except (OSError, ValueError, KeyError):  # corrupt: never the best
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _quiet_orbax() -> None:
    """Orbax logs ten lines per save at the level at which the loop reports its progress."""
    logging.get_absl_logger().addFilter(_is_not_orbax_chatter)


def _is_not_orbax_chatter(record: Any) -> bool:
    return record.levelno >= 30 or "/orbax/" not in record.pathname
