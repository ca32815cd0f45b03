"""Saves a tree of arrays with Orbax, so that a full disk is one error and leaves nothing beside."""

import errno
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

_ROOM_BYTES = 1 << 30  # of one file, as file systems limit those, too


def save_tree(tree: Mapping[str, Any], folder: Path) -> None:
    """Saves a tree in an empty folder.

    Raises:
        OSError: the disk is full, or has no room for the arrays before compression.
    """
    _find_room(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
    # Orbax works in a folder beside its target: inside this one, it goes where this one goes.
    inner = folder.resolve() / "orbax"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(inner, tree)
            checkpointer.wait_until_finished()
    except Exception as error:  # tensorstore raises whatever its storage met
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from None
        raise
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()


def _find_room(folder: Path, num_bytes: int) -> None:
    """Asks for the space first: Orbax's threads would report one full disk in many tracebacks."""
    if not hasattr(os, "posix_fallocate"):  # macOS, Windows
        return
    with tempfile.TemporaryDirectory(dir=folder) as room:
        for start in range(0, num_bytes, _ROOM_BYTES):
            with (Path(room) / str(start)).open("wb") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, min(_ROOM_BYTES, num_bytes - start))
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # cannot be asked
                        raise
