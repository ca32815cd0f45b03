"""Which implementation of the packed products runs. The one place that chooses."""

import difflib
from types import ModuleType

import jax

from gemmaqat.kernels import reference, xla

BACKENDS: dict[str, ModuleType] = {"xla": xla, "reference": reference}


def select(backend: str = "auto") -> ModuleType:
    """The module with `matmul`, `matmul_transposed`, `gather` and `ragged_matmul`.

    Args:
        backend: a name in `BACKENDS`, or "auto" for the best one on this platform.

    Raises:
        ValueError: no such backend; a backend asked for by name is never replaced by another.
    """
    if backend == "auto":
        return xla
    if backend not in BACKENDS:
        near = difflib.get_close_matches(backend, BACKENDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them or 'auto'."
        raise ValueError(f"kernel backend {backend!r} is not one of {', '.join(BACKENDS)}; {hint}")
    return BACKENDS[backend]


def explain(backend: str = "auto") -> str:
    """One line for people: which backend runs on this platform."""
    name = select(backend).__name__.rpartition(".")[2]
    return f"packed products on {jax.default_backend()}: {name} ({backend})"
