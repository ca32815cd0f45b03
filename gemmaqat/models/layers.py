"""The leaves of the model, the three ways an activation meets a weight, and the hook points."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemmaqat.kernels.ragged import ragged_matmul
from gemmaqat.typing import Weight


def contract(x: Float[Array, "... K"], w: Weight) -> Float[Array, "... N"]:
    """`x @ w` for a float matrix `[K, N]` or anything that knows how to `contract`."""
    if not _is_array(w):
        return w.contract(x)
    # One matrix of rows: on CPU the gradient of a batched product takes twice the time.
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ w.astype(x.dtype)).reshape(*x.shape[:-1], w.shape[-1])


def take(w: Weight, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of a table `[V, D]`, float or anything that knows how to `take`.

    Ids are clipped to 0 .. V - 1: a negative one gives the first row, it does not count from the
    end.
    """
    return jnp.take(w, ids, axis=0, mode="clip") if _is_array(w) else w.take(ids)


def ragged_contract(
    x: Float[Array, "M K"], w: Weight, group_sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """Groups of consecutive rows, each times its own matrix of `w` `[E, K, N]`."""
    if not _is_array(w):
        return w.ragged_contract(x, group_sizes)
    return ragged_matmul(x, w.astype(x.dtype), group_sizes)


def _is_array(w: Weight) -> bool:
    return isinstance(w, jax.Array) or not hasattr(w, "contract")


def init_normal(rngs: nnx.Rngs | None, shape: tuple[int, ...], *, stddev: float, dtype: str) -> Any:
    """A normal initial value, or its abstract shape where `rngs` is None.

    The abstract form makes a model of any size in milliseconds, without storage and tracing.
    """
    if rngs is None:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return (stddev * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


def init_constant(
    rngs: nnx.Rngs | None, shape: tuple[int, ...], *, value: float, dtype: str
) -> Any:
    """A constant initial value, or its abstract shape where `rngs` is None."""
    if rngs is None:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return jnp.full(shape, value, dtype)


class HookPoint(nnx.Module):
    """A named place where an activation passes unchanged until a quantizer takes the place.

    `input` and `output` of a leaf are its own. An `input` that several leaves share says which
    ones it `feeds`; their own inputs then stay unused.
    """

    is_hook_point = True

    def __init__(self, *, feeds: tuple[str, ...] = ()):
        """`feeds`: the sibling modules that this input is of."""
        self.feeds = feeds

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns `x`."""
        return x


class Linear(nnx.Module):
    """`output(input(x) @ weight)` with `weight` `[in, out]` and no bias."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        axes: tuple[str | None, str | None],
        dtype: str,
        rngs: nnx.Rngs | None,
    ):
        weight = init_normal(rngs, (in_dim, out_dim), stddev=in_dim**-0.5, dtype=dtype)
        self.weight = nnx.Param(weight, axes=axes)
        self.input = HookPoint()
        self.output = HookPoint()

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        """Projects the last axis."""
        return self.output(contract(self.input(x), self.weight.get_value()))


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` over the last axis, in float32; the weight multiplies as stored."""

    def __init__(
        self, dim: int, *, eps: float, dtype: str, rngs: nnx.Rngs | None, value: float = 1.0
    ):
        self.eps = eps
        self.weight = nnx.Param(init_constant(rngs, (dim,), value=value, dtype=dtype), axes=(None,))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        weight = self.weight.get_value().astype(jnp.float32)
        weight = jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
        return (_normalise(x, self.eps) * weight).astype(x.dtype)


def rms_normalise(x: Float[Array, "... D"], *, eps: float) -> Float[Array, "... D"]:
    """RMS norm without a weight."""
    return _normalise(x, eps).astype(x.dtype)


def _normalise(x: Array, eps: float) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
