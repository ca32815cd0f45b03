"""What happens when a loss or a gradient is no longer a number: stop, name it, keep the batch."""

import json
import math
from pathlib import Path

import numpy as np

FOLDER = "nonfinite"


class NonFiniteError(ValueError):
    """A loss or gradient held NaN or infinity. The parameters of that step were not saved."""


def check_finite(
    workdir: Path,
    *,
    step: int,
    loss: float,
    finite: np.ndarray,
    paths: list[str],
    batch: dict[str, np.ndarray],
) -> None:
    """Passes a healthy step; otherwise writes its batch and raises.

    Args:
        workdir: gets `nonfinite/step_00000012.npz` (the batch) and `.json` (what was found).
        step: steps done, this one included.
        loss: of the step.
        finite: one flag per parameter's gradient.
        paths: the parameters' paths, in the same order.
        batch: the arrays of the step.

    Raises:
        NonFiniteError: with step, paths and the file of the batch.
    """
    bad = [path for path, good in zip(paths, finite, strict=True) if not good]
    if math.isfinite(loss) and not bad:
        return
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    path = _free(folder / f"step_{step:08d}.npz")
    np.savez(path, allow_pickle=False, **batch)
    found = {"step": step, "loss": repr(loss), "gradients": bad}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1))
    shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    raise NonFiniteError(
        f"step {step}: loss is {loss}, gradients not finite in {shown or 'no parameter'}; the "
        f"batch is in {path}, checkpoints before this step are untouched. Try a lower "
        "optimizer.learning_rate or a smaller optimizer.clip_norm."
    )


def _free(path: Path) -> Path:
    """The path, or the next one with a number that does not exist yet."""
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_stem(f"{path.stem}_{count}")
    return candidate
