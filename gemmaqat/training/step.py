"""The compiled programs of training: weight map, gradients, update, hold-out loss.

One optimizer step is

    weights, pullback = quantize(params)          # a small program per table
    grads, loss = gradients(weights, batch)       # one program per loss, whatever the table
    grads = pullback(grads)                       # a small program per table
    params, state = update(params, state, grads)  # one program per optimizer

The gradient program takes weights that are quantized already, so a float run, every table and
both sides of a delayed start run the same compiled code.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from gemmaqat.config import OptimizerConfig, TrainConfig
from gemmaqat.quantization import trees
from gemmaqat.quantization.activations import (
    activation_scales,
    freeze_scales,
    without_activations,
)
from gemmaqat.quantization.fake import fake_quantize
from gemmaqat.training import losses
from gemmaqat.training.optimizer import make_optimizer
from gemmaqat.typing import Params

Batch = dict[str, Array]  # [A, B, T] each: A micro-batches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateStatus:
    """What an update tells about its numbers.

    Attributes:
        gradient_norm: of the whole gradient, before clipping.
        finite: one flag per parameter, in the order of `jax.tree.leaves(params)`, for its gradient
            and its updated value together; the last one is for the whole optimizer state.
    """

    gradient_norm: Float[Array, ""]
    finite: Bool[Array, " flags"]


@dataclasses.dataclass(frozen=True)
class QuantizeMap:
    """Fake quantization of a parameter tree as two small programs.

    Attributes:
        forward: parameters to (weights, pullback).
        backward: (pullback, gradient of the weights) to the gradient of the parameters.
    """

    forward: Callable[[Params], tuple[Params, Any]]
    backward: Callable[[Any, Params], Params]


IDENTITY = QuantizeMap(
    forward=lambda params: (params, None), backward=lambda pullback, grads: grads
)
# A quantizer that is off has no gradient, so that of the weights is that of the parameters.
IN_FLOAT = QuantizeMap(
    forward=lambda params: (without_activations(params), None), backward=IDENTITY.backward
)


class Programs:
    """The jitted functions of training, to be shared by all runs of one model shape.

    Attributes:
        next_token: (weights, batch) to (gradient of the mean loss, mean loss).
        kl: (weights, teacher weights, batch) to the same, for KL(teacher || model).
        next_token_sum: (weights, batch) to (sum of weighted losses, sum of weights).
        kl_sum: (weights, teacher weights, batch) to the same.
        update: (params, optimizer state, gradient, rate) to (params, state, `UpdateStatus`); the
            first two are donated.
        init: params to the optimizer state.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, train: TrainConfig, optimizer: OptimizerConfig
    ) -> None:
        self.graphdef = graphdef
        self.settings = _settings(train, optimizer)
        chunk = train.loss_chunk_tokens
        transformation = make_optimizer(optimizer)

        def next_token(weights: Params, batch: Batch) -> Array:
            model = nnx.merge(graphdef, weights)
            return losses.next_token_loss(model, batch, chunk_tokens=chunk)

        def kl(weights: Params, teacher: Params, batch: Batch) -> Array:
            model, teacher_model = nnx.merge(graphdef, weights), nnx.merge(graphdef, teacher)
            return losses.kl_loss(model, teacher_model, batch, chunk_tokens=chunk)

        self.next_token = jax.jit(lambda weights, batch: _accumulate(next_token, weights, batch))
        self.kl = jax.jit(
            lambda weights, teacher, batch: _accumulate(
                lambda weights, part: kl(weights, teacher, part), weights, batch
            )
        )
        self.next_token_sum = jax.jit(
            lambda weights, batch: (next_token(weights, batch), jnp.sum(batch["loss_weights"]))
        )
        self.kl_sum = jax.jit(
            lambda weights, teacher, batch: (
                kl(weights, teacher, batch),
                jnp.sum(batch["loss_weights"]),
            )
        )
        self.init = jax.jit(transformation.init)
        self.update = jax.jit(functools.partial(_update, transformation), donate_argnums=(0, 1))
        self._maps: dict[str, QuantizeMap] = {}

    def quantize_map(self, table: Any | None, *, learn_scales: bool = False) -> QuantizeMap:
        """The map of one table, compiled once however many runs ask; the identity for None.

        Without `learn_scales` the gradient stops at the scales of activations.
        """
        if table is None:
            return IDENTITY
        key = json.dumps([table.to_json(), learn_scales], sort_keys=True)
        if key not in self._maps:

            def quantize(params: Params) -> Params:
                return fake_quantize(params if learn_scales else freeze_scales(params), table)

            self._maps[key] = QuantizeMap(
                forward=jax.jit(lambda params: jax.vjp(quantize, params)),
                # Donated: the gradient of the weights becomes that of the parameters in place.
                backward=jax.jit(lambda pullback, grads: pullback(grads)[0], donate_argnums=1),
            )
        return self._maps[key]

    def check(self, graphdef: nnx.GraphDef, train: TrainConfig, optimizer: OptimizerConfig) -> None:
        """Raises ValueError if these programs were made for another model or other settings."""
        if graphdef != self.graphdef:
            raise ValueError(
                "programs: made for a model of another structure; call make_programs for this one."
            )
        wanted = _settings(train, optimizer)
        for name, value in wanted.items():
            if self.settings[name] != value:
                raise ValueError(
                    f"programs: made with {name}={self.settings[name]!r}, the run has {value!r}; "
                    "call make_programs with the run's own sections."
                )


def make_programs(
    graphdef: nnx.GraphDef, train: TrainConfig, optimizer: OptimizerConfig
) -> Programs:
    """The programs of one model shape; nothing is compiled before its first call.

    Runs that share them may differ in table, method, number of steps and learning rate.
    """
    return Programs(graphdef, train, optimizer)


def split_batch(batch: dict[str, np.ndarray], accumulation_steps: int) -> dict[str, np.ndarray]:
    """[B, T] arrays to [A, B/A, T]: consecutive rows form a micro-batch."""
    return {
        name: array.reshape(accumulation_steps, -1, *array.shape[1:])
        for name, array in batch.items()
    }


def _accumulate(
    loss: Callable[[Params, Batch], Array], weights: Params, batch: Batch
) -> tuple[Params, Array]:
    """Gradient and value of the loss per unit of loss weight, summed over micro-batches."""
    # One divisor for the whole step: micro-batches with few answers do not count more.
    scale = 1 / jnp.maximum(jnp.sum(batch["loss_weights"]), 1e-9)
    gradient = jax.value_and_grad(lambda weights, part: loss(weights, part) * scale)

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(weights, part)), None

    if batch["tokens"].shape[0] == 1:
        value, grads = gradient(weights, jax.tree.map(lambda array: array[0], batch))
    else:
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
        (value, grads), _ = jax.lax.scan(add, zero, batch)
    return grads, value


def _update(
    transformation: optax.GradientTransformation,
    params: Params,
    state: optax.OptState,
    grads: Params,
    rate: Float[Array, ""],
) -> tuple[Params, optax.OptState, UpdateStatus]:
    norm = optax.tree.norm(grads)
    before = _finite(grads)
    direction, state = transformation.update(grads, state, params)
    steps, scales = trees.weights(direction), activation_scales(params)

    def move(path: str, param: Array) -> Array:
        step = rate * steps[path][0]
        # A scale moves by a factor: it stays positive, and large and small ones learn alike.
        moved = param * jnp.exp(-step) if path in scales else param - step
        return moved.astype(param.dtype)

    params = trees.map_weights(move, params)
    # All that a checkpoint holds: a finite gradient may still overflow an update or a moment.
    finite = jnp.append(before & _finite(params), _finite(state).all())
    return params, state, UpdateStatus(gradient_norm=norm, finite=finite)


def _finite(tree: Any) -> Bool[Array, " leaves"]:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)], bool)


def _settings(train: TrainConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """Every setting that is compiled in."""
    compiled = {
        f"optimizer.{name}": value
        for name, value in dataclasses.asdict(optimizer).items()
        if name not in ("learning_rate", "schedule", "warmup_steps", "final_fraction")
    }
    return compiled | {"train.loss_chunk_tokens": train.loss_chunk_tokens}
