"""How many floating-point operations a run takes, and how long that is on this device."""

import time

import jax
import jax.numpy as jnp

from gemmaqat.config import Experiment
from gemmaqat.models.config import ModelConfig

# Share of a plain matmul's speed that a whole step reaches; norms, attention and the optimizer
# take the rest. A rough figure: expect the truth within a factor of two.
_EFFICIENCY = 0.4


def forward_operations(config: ModelConfig, *, length: int) -> int:
    """Operations of one forward pass per token, in sequences of `length` (a multiply-add is 2)."""
    attention = 0.0
    for layer in range(config.num_layers):
        seen = (length + 1) / 2  # the mean number of keys of a causal query
        if config.is_sliding(layer) and length > config.sliding_window:
            window = config.sliding_window
            seen = window - window * (window - 1) / (2 * length)  # shorter at the start
        attention += 4 * seen * config.num_heads * config.layer_head_dim(layer)
    return int(2 * config.num_active_parameters + attention)


def step_operations(experiment: Experiment, config: ModelConfig, *, method: str) -> int:
    """Operations of one optimizer step: forward, backward (twice that), recomputation, teacher."""
    forward = forward_operations(config, length=experiment.data.sequence_length)
    passes = 3 + (config.remat == "full") + (method == "distill")
    return passes * forward * experiment.data.batch_size * experiment.data.sequence_length


def comparison_operations(experiment: Experiment, config: ModelConfig) -> int:
    """Training operations of one size of a comparison: base, then QAT, distilled QAT, control.

    The base is trained and the control continued once; the other arms once per recipe.
    """
    compare = experiment.compare
    plain = step_operations(experiment, config, method="none")
    distilled = step_operations(experiment, config, method="distill")
    per_seed = (compare.base_steps + compare.arm_steps) * plain
    per_seed += len(compare.recipes) * compare.arm_steps * (plain + distilled)
    return len(compare.seeds) * per_seed


def measure_speed(config: ModelConfig, *, tokens: int) -> float:
    """Operations per second of (part of) the model's gate projection on the default device."""
    rows, columns = min(tokens, 512), min(config.mlp_dim, 2048)
    x = jnp.ones((rows, config.embed_dim), config.dtype)
    w = jnp.ones((config.embed_dim, columns), config.dtype)
    matmul = jax.jit(jnp.matmul)
    matmul(x, w).block_until_ready()
    repeats, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < 0.2:
        matmul(x, w).block_until_ready()
        repeats += 1
    return repeats * 2 * rows * config.embed_dim * columns / elapsed


def estimate_seconds(operations: int, *, speed: float) -> float:
    """Time of so many operations at the share of `speed` that whole steps reach."""
    return operations / (_EFFICIENCY * speed)


def format_seconds(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h` or `9 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"
