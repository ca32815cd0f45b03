"""What a run minimises: the next-token loss, or the KL divergence to a float teacher.

Distillation here follows Hinton et al. (2015) at temperature 1, on the full distribution: the
quantized student should give the probabilities of the float model, not only its favourite token.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from gemmaqat.training.step import Batch, Programs
from gemmaqat.typing import Params


@dataclasses.dataclass(frozen=True)
class Objective:
    """One loss, with its teacher bound where it has one.

    Attributes:
        gradients: (weights, batch [A, B, T]) to (gradient of the mean loss, mean loss).
        sums: (weights, batch [B, T]) to (sum of weighted losses, sum of loss weights).
    """

    gradients: Callable[[Params, Batch], tuple[Params, jax.Array]]
    sums: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]

    def mean(self, weights: Params, batches: Iterable[dict[str, np.ndarray]]) -> float:
        """Loss per unit of loss weight over several batches, nats."""
        sums = [self.sums(weights, jax.device_put(batch)) for batch in batches]
        total, weight = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
        return float(total / weight)


def make_objective(method: str, programs: Programs, teacher: Params | None) -> Objective:
    """The objective of `train.method`.

    Args:
        method: none, qat (both: next token) or distill.
        programs: the compiled functions.
        teacher: float parameters, for distill.
    """
    if method != "distill":
        return Objective(gradients=programs.next_token, sums=programs.next_token_sum)

    def gradients(weights: Params, batch: Batch) -> Any:
        return programs.kl(weights, teacher, batch)

    def sums(weights: Params, batch: Batch) -> Any:
        return programs.kl_sum(weights, teacher, batch)

    return Objective(gradients=gradients, sums=sums)
