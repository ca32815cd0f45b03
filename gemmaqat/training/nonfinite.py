"""What happens when a step's numbers are none any more: stop, name them, keep the batch."""

import json
import math
from pathlib import Path

import numpy as np

FOLDER = "nonfinite"


class NonFiniteError(ValueError):
    """A loss, gradient or update held NaN or infinity. Nothing of that step was saved."""


def check_finite(
    workdir: Path,
    *,
    step: int,
    loss: float,
    finite: np.ndarray,
    checked: list[str],
    batch: dict[str, np.ndarray],
) -> None:
    """Passes a healthy step; otherwise writes its batch and raises.

    Args:
        workdir: gets `nonfinite/step_00000012.npz` (the batch) and `.json` (what was found).
        step: steps done, this one included.
        loss: of the step.
        finite: one flag per parameter (its gradient and updated value), and the optimizer's.
        checked: the name of what each flag is about, in the same order.
        batch: the arrays of the step.

    Raises:
        NonFiniteError: with step, paths and the file of the batch.
    """
    bad = [name for name, good in zip(checked, finite, strict=True) if not good]
    if math.isfinite(loss) and not bad:
        return
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    path = _free(folder / f"step_{step:08d}.npz")
    np.savez(path, allow_pickle=False, **batch)
    found = {"step": step, "loss": repr(loss), "not_finite": bad}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1))
    shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    where = f"gradient or update not finite in {shown}" if bad else "every gradient is finite"
    raise NonFiniteError(
        f"step {step}: loss is {loss}, {where}; the batch is in {path}, checkpoints before this "
        "step are untouched. Try a lower optimizer.learning_rate or a smaller optimizer.clip_norm."
    )


def _free(path: Path) -> Path:
    """The path, or the next one with a number that does not exist yet."""
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_stem(f"{path.stem}_{count}")
    return candidate
