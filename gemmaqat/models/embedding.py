"""Token and per-layer embeddings, and the tied output head."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemmaqat.models.layers import contract, init_normal, take


class Embed(nnx.Module):
    """A table `[V, D]`: rows by id, and scores of all rows by product.

    The parameter says along which axis it meets its activation (`contraction_axis=-1`: a row is
    what is contracted) and whether it is ever multiplied (`gather_only`).
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        stddev: float,
        gather_only: bool,
        dtype: str,
        rngs: nnx.Rngs | None,
    ):
        self.weight = nnx.Param(
            init_normal(rngs, (vocab_size, dim), stddev=stddev, dtype=dtype),
            contraction_axis=-1,
            gather_only=gather_only,
            axes=("vocab", "embed"),
        )

    def __call__(
        self, ids: Int[Array, "..."], *, scale: float, dtype: str
    ) -> Float[Array, "... D"]:
        """Rows times `scale`, the factor rounded to `dtype` first as the released models do."""
        rows = take(self.weight.get_value(), ids).astype(dtype)
        return rows * jnp.asarray(scale, dtype)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The product of `x` with every row, unscaled."""
        return contract(x, self.weight.get_value().T)
