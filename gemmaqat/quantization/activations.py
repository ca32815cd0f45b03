"""Activation quantizers: int8 at hook points, with a straight-through gradient.

`prepare` puts a quantizer at every hook point that a table's activation entries name:

    x -> clamp(round_half_even(x / s), -128, 127) * s

The scale s of a `StaticQuantizer` is a parameter like any other: trained or fixed, saved with the
weights, shipped as a number. That of a `DynamicQuantizer` is each token's own, its largest
magnitude / 127.5 (compressed-tensors' "int8, symmetric, token, dynamic"); what stands as its scale
among the parameters is a switch, 1 or 0, which is never trained and takes no room in a file.

A scale of 0 means "off" (not calibrated) and passes the activation on unchanged, so a prepared
model whose scales are all 0 is the float model, and float and quantized arms share one program.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from gemmaqat.quantization import trees
from gemmaqat.quantization.table import SCALE, Table
from gemmaqat.typing import Params

LOWEST, HIGHEST = -128, 127
_HALF_RANGE = (HIGHEST - LOWEST) / 2  # a token's largest magnitude, in its steps

Model = TypeVar("Model", bound=nnx.Module)


class StaticQuantizer(nnx.Module):
    """A hook point that rounds to 8 bits under one scale for the whole tensor."""

    is_hook_point = True

    def __init__(self, scale: Any, *, feeds: tuple[str, ...] = ()):
        """`scale`: float32 `()`, an array or its abstract shape; `feeds` as of the hook point."""
        self.scale = nnx.Param(scale, activation_scale=True, axes=())
        self.feeds = feeds

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The nearest of the 256 values; `x` itself where the scale is 0."""
        return quantize_statically(x, self.scale.get_value())


class DynamicQuantizer(nnx.Module):
    """A hook point that rounds every token to 8 bits under the scale of its largest magnitude."""

    is_hook_point = True

    def __init__(self, switch: Any, *, feeds: tuple[str, ...] = ()):
        """`switch`: float32 `()`, 0 = off, an array or its abstract shape; `feeds` as above."""
        self.scale = nnx.Param(switch, activation_scale=True, axes=())
        self.feeds = feeds

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The nearest of the 256 values of each token; `x` itself where the switch is 0."""
        return quantize_by_token(x, self.scale.get_value())


@jax.custom_vjp
def quantize_statically(x: Float[Array, "..."], scale: Float[Array, ""]) -> Float[Array, "..."]:
    """`x` on the 8-bit grid of `scale`, in the dtype of `x`, to which the scale is cast first.

    Gradients: to `x` as it is inside the range, 0 outside (the clamp is flat there); to the scale
    that of learned step size quantization (LSQ, Esser et al., 2019, arXiv 1902.08153), with its
    factor 1 / sqrt(127 * number of elements).
    """
    step, ratio = _ratio(x, scale)
    codes = jnp.clip(jnp.round(ratio), LOWEST, HIGHEST)
    return jnp.where(_is_off(scale, x.ndim), x, codes * step)


def _forward(x: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return quantize_statically(x, scale), (x, scale)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, scale = saved
    off = _is_off(scale, x.ndim)
    # Of the rounded scale, in float32: bfloat16 holds neither the distance to a code, which is
    # most of the slope, nor the sum of so many terms.
    _, ratio = _ratio(x.astype(jnp.float32), scale.astype(x.dtype).astype(jnp.float32))
    inside = (ratio >= LOWEST) & (ratio <= HIGHEST)
    to_x = jnp.where(inside | off, gradient, 0)
    slope = jnp.where(inside, jnp.round(ratio) - ratio, jnp.clip(ratio, LOWEST, HIGHEST))
    total = jnp.sum(jnp.where(off, 0, slope) * gradient.astype(jnp.float32))
    return to_x, (total / np.sqrt(HIGHEST * max(x.size, 1))).astype(scale.dtype)


quantize_statically.defvjp(_forward, _backward)


def _ratio(x: Array, scale: Array) -> tuple[Array, Array]:
    """The scale in the dtype of `x`, with as many axes, and `x / scale` (`x` where it is 0)."""
    scale = scale.astype(x.dtype).reshape((1,) * x.ndim)
    scale = jnp.where(scale == 0, 1, scale)
    # A divisor that depends on x: XLA makes a product with the rounded reciprocal of a division
    # by one number, and a tie would fall to the other side than in other libraries.
    return scale, x / jnp.where(x != 0, scale, 1)


def _is_off(scale: Array, ndim: int) -> Array:
    return (scale == 0).reshape((1,) * ndim)


@jax.custom_vjp
def quantize_by_token(x: Float[Array, "... D"], switch: Float[Array, ""]) -> Float[Array, "... D"]:
    """Each row of the last axis on the 8-bit grid of its largest magnitude / 127.5, in float32.

    Gradients: to `x` as it is, to the switch none. A row of zeros stays one.

    Source: compressed-tensors 0.20, `compute_dynamic_scales_and_zp` and `fake_quantize`.
    """
    wide = x.astype(jnp.float32)
    reach = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    # Divisors that depend on what is divided: see `_ratio`.
    scale = reach / jnp.where(reach > 0, np.float32(_HALF_RANGE), 1)
    step = jnp.where((wide != 0) & (scale > 0), scale, 1)
    codes = jnp.clip(jnp.round(wide / step), LOWEST, HIGHEST)
    return jnp.where(_is_off(switch, x.ndim), x, (codes * scale).astype(x.dtype))


def _forward_by_token(x: Array, switch: Array) -> tuple[Array, Array]:
    return quantize_by_token(x, switch), switch


def _backward_by_token(switch: Array, gradient: Array) -> tuple[Array, Array]:
    return gradient, jnp.zeros_like(switch)


quantize_by_token.defvjp(_forward_by_token, _backward_by_token)


def prepare(model: Model, table: Table) -> Model:
    """A model like this one with a quantizer at every hook point that the table names.

    The new quantizers are off (scale 0) until `calibrate` sets them; those that are there already
    keep their scale. Weights are shared with `model`, which is left as it is.

    Args:
        model: it may be abstract.
        table: resolved for this model; one without activations changes nothing.

    Raises:
        ValueError: the table names a hook point that the model does not have, or wants a static
            quantizer where there is a dynamic one, or the other way round.
    """
    if not table.activations:
        return model
    hooks = trees.hook_points(model)
    off, new = _scale_zero(model), {}
    for entry in table.activations:
        kind = StaticQuantizer if entry.static else DynamicQuantizer
        hook = hooks.get(entry.path)
        if hook is None:
            raise ValueError(
                f"{entry.path}: no such hook point in the model; resolve the rules for this model "
                "and use that table."
            )
        if isinstance(hook, (StaticQuantizer, DynamicQuantizer)):
            if not isinstance(hook, kind):
                raise ValueError(
                    f"{entry.path}: the model has a {type(hook).__name__} here, the table asks for "
                    f"a {kind.__name__}; compare such recipes in runs of their own, from a model "
                    "that has neither."
                )
            continue
        new[entry.path] = kind(off, feeds=hook.feeds)
    return trees.with_modules(model, new)


def activation_scales(params: Params) -> dict[str, Any]:
    """Parameter path to scale, of a prepared model or its state."""
    return {
        path: value
        for path, (value, metadata) in trees.weights(params).items()
        if trees.is_activation_scale(metadata)
    }


def with_scales(params: Params, scales: dict[str, Any]) -> Params:
    """The same model or state with these scales, by parameter path, in the place of its own."""
    if not scales:
        return params

    def one(path: str, value: Any) -> Any:
        if path not in scales:
            return value
        # Where the old one was: JAX compiles anew for arrays that live elsewhere.
        return jax.device_put(jnp.asarray(scales[path], value.dtype), value.sharding)

    return trees.map_weights(one, params)


def without_activations(params: Params) -> Params:
    """The same model or state with every scale 0: its activations are float again."""
    return with_scales(params, dict.fromkeys(activation_scales(params), 0.0))


def only_activations(model: Model, table: Table | None) -> Model:
    """The same model with the scales of this table's activations alone; all others are 0."""
    kept = frozenset() if table is None else table.activation_scales
    return with_scales(model, {path: 0.0 for path in activation_scales(model) if path not in kept})


def check_scales(params: Params, table: Table) -> None:
    """Refuses a model whose quantizers are off, or missing, where the table has them.

    Raises:
        ValueError: an activation of the table has no scale, or 0.
    """
    scales = activation_scales(params)
    off = [e.path for e in table.activations if not float(scales.get(f"{e.path}/{SCALE}", 0))]
    if off:
        raise ValueError(
            f"{off[0]}: the table quantizes {len(table.activations)} activations, and the model "
            f"has no scales for {len(off)} of them; calibrate it before it is converted (a run "
            "saved before train.start_step: train on, or run `gemmaqat quantize` on it)."
        )


def freeze_scales(params: Params) -> Params:
    """The same tree with a gradient of zero at every scale."""
    frozen = {path: jax.lax.stop_gradient(x) for path, x in activation_scales(params).items()}
    return trees.map_weights(lambda path, value: frozen.get(path, value), params)


def _scale_zero(model: nnx.Module) -> Any:
    """A scale of 0 where the parameters are: on all their devices, or abstract as they."""
    leaf = next(iter(jax.tree.leaves(nnx.state(model, nnx.Param))))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((), jnp.float32)
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(jnp.zeros((), jnp.float32), sharding)
