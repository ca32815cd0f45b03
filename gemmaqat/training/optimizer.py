"""Optimizers and learning-rate schedules by config, composed from optax.

The transformation does not hold the learning rate: the update takes it as an argument. So a float
base of 600 steps and its arms of 100 steps, with other peaks and warm-ups, share one compiled
update program.
"""

import math
from typing import Any

import optax

from gemmaqat.config import OptimizerConfig
from gemmaqat.quantization import trees


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The direction of a step: clipping, the named method, weight decay. To be scaled by -rate.

    `state_dtype` is that of the first moment (the momentum of sgd). The second moment stays in the
    parameters' dtype: with b2 close to 1 its increments vanish in bfloat16's 8 bits. Adafactor
    keeps row and column sums only and no first moment.
    """
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += _METHODS[config.name](config)
    return optax.chain(*parts)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of one step (0-based): linear warm-up to the peak, then the schedule.

    The last step of the run has `final_fraction` of the peak.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decaying_steps = max(num_steps - 1 - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / decaying_steps, 1.0)
    remaining = _SCHEDULES[config.schedule](done)
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * remaining)


def is_decayed(params: Any) -> Any:
    """True for matrices; norms, scalars and per-channel scales are never decayed.

    Nor are tables that are only gathered: rows that no batch holds are to stay as they are.
    """
    gathered = {path for path, (_, m) in trees.weights(params).items() if m.get("gather_only")}
    return trees.map_weights(lambda path, leaf: leaf.ndim >= 2 and path not in gathered, params)


def _adam(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    return [optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=config.state_dtype)]


def _adamw(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    parts = _adam(config)
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=is_decayed))
    return parts


def _adafactor(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    del config  # the published decay of the second moment; no momentum
    return [
        optax.scale_by_factored_rms(min_dim_size_to_factor=32),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    ]


def _sgd(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    if not config.b1:
        return []
    return [optax.trace(decay=config.b1, accumulator_dtype=config.state_dtype)]


_METHODS = {"adamw": _adamw, "adam": _adam, "adafactor": _adafactor, "sgd": _sgd}
# Share of the decay that remains, from the share of decaying steps that is done.
_SCHEDULES = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
