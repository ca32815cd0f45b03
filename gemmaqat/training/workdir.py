"""The work directory of a run: whose it is, and what it says about itself."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import logging

import gemmaqat
from gemmaqat import config
from gemmaqat.config import Experiment
from gemmaqat.json_file import read_json
from gemmaqat.quantization.rules import Table
from gemmaqat.training.records import METRICS, write_atomically

CONFIG, QUANTIZATION, RUN = "config.json", "quantization.json", "run.json"

_LOCK = ".lock"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds the directory, created where missing, against every other process.

    The operating system frees it when this process ends, however it ends; the empty file stays.

    Raises:
        ValueError: another process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{workdir}: another process is working here; wait for it or choose another "
                "--workdir."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logging.warning("%s: this file system has no locks; see to it that no other process "
                            "works there.", workdir)  # fmt: skip
        yield


def claim(
    workdir: Path, *, experiment: Experiment, table: Table | None, hashes: dict[str, str]
) -> None:
    """Makes the directory this run's, or checks that it is already.

    Args:
        workdir: created where missing.
        experiment: the whole config; any difference makes it another run.
        table: the resolved quantization; None for a float run, which gets no quantization.json.
        hashes: SHA-256 of the parameters that the run rests on (start, teacher), by role.

    Raises:
        ValueError: it belongs to another run. Nothing in it has been touched.
    """
    check_config(workdir, experiment)
    if (workdir / CONFIG).exists():
        _check_inputs(workdir, table=table, hashes=hashes)
        return
    workdir.mkdir(parents=True, exist_ok=True)
    if table is not None:
        _write_json(workdir / QUANTIZATION, table.to_json())
    _write_json(workdir / RUN, _about(experiment, hashes))
    # Last: a directory is claimed once its config is there.
    _write_json(workdir / CONFIG, config.to_json(experiment))


def check_config(workdir: Path, experiment: Experiment) -> None:
    """Raises ValueError if the directory belongs to another config; cheap, reads two files."""
    if (workdir / CONFIG).exists():
        found = config.load(workdir / CONFIG)
        refuse(workdir, "another config", config.differences(found, experiment))
        return
    strangers = [name for name in ("checkpoints", METRICS) if (workdir / name).exists()]
    if strangers:
        raise ValueError(
            f"{workdir}: holds {' and '.join(strangers)} but no {CONFIG}, so it is unclear whose "
            "they are; choose another work directory."
        )


def table_differences(found: dict[str, Any] | None, table: Table | None) -> list[str]:
    """In what a saved table differs from the one at hand; empty where they are equal."""
    if found is None or table is None:
        left, right = ("none (float)" if t else "a table" for t in (found is None, table is None))
        return [] if left == right else [f"quantization: {left} -> {right}"]
    return Table.from_json(found).diff(table)


def plain_differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Every field in which two flat mappings differ, as `field: found -> wanted`."""
    return [
        f"{key}: {found.get(key)!r} -> {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]


def refuse(where: Path, belongs_to: str, differences: list[str]) -> None:
    """Raises ValueError with the first differences, if there are any."""
    if differences:
        shown = "; ".join(differences[:8])
        more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ValueError(
            f"{where}: belongs to {belongs_to} (there -> here: {shown}{more}); choose another work "
            "directory, or go back to its settings."
        )


def _check_inputs(workdir: Path, *, table: Table | None, hashes: dict[str, str]) -> None:
    path = workdir / QUANTIZATION
    found = read_json(path, "restore it from a copy") if path.exists() else None
    refuse(path, "another quantization table", table_differences(found, table))
    about = read_json(workdir / RUN, "restore it from a copy")
    refuse(workdir / RUN, "a run from other parameters", plain_differences(about["hashes"], hashes))


def _about(experiment: Experiment, hashes: dict[str, str]) -> dict[str, Any]:
    return {
        "format_version": 1,
        "versions": {"python": platform.python_version()} | versions(),
        "platform": platform.platform(),
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()],
        "seeds": {
            "experiment": experiment.seed,
            "data": experiment.data.seed,
            "holdout": experiment.data.holdout_seed,
        },
        "hashes": hashes,
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a run's numbers."""
    found = {"gemmaqat": gemmaqat.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def model_json(model: Any) -> dict[str, Any]:
    """A model's config as plain JSON values; empty for a model that has none."""
    model_config = getattr(model, "config", None)
    return _plain(dataclasses.asdict(model_config)) if model_config is not None else {}


def _plain(value: Any) -> Any:
    """As it comes back from a file: tuples are lists, keys are strings."""
    return json.loads(json.dumps(value))


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")
