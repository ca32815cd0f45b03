"""The mixture of experts of the 26B-A4B: router and grouped GeGLU experts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemmaqat.models.config import ModelConfig
from gemmaqat.models.layers import (
    HookPoint,
    Linear,
    init_constant,
    init_normal,
    ragged_contract,
    rms_normalise,
)


class Router(nnx.Module):
    """Chooses experts: softmax over all, top k, renormalise, then each expert's own scale."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None):
        self.eps = config.rms_norm_eps
        self.num_chosen = config.num_experts_per_token
        self.proj = Linear(
            config.embed_dim,
            config.num_experts,
            axes=("embed", None),
            dtype=config.param_dtype,
            rngs=rngs,
        )
        ones: dict[str, Any] = dict(value=1.0, dtype=config.param_dtype)
        self.scale = nnx.Param(init_constant(rngs, (config.embed_dim,), **ones), axes=(None,))
        self.per_expert_scale = nnx.Param(
            init_constant(rngs, (config.num_experts,), **ones), axes=(None,)
        )

    def __call__(self, x: Float[Array, "M D"]) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
        """Weights and numbers of the chosen experts of each token; weights need not sum to 1."""
        scale = self.scale.get_value().astype(x.dtype) * x.shape[-1] ** -0.5
        scores = self.proj(rms_normalise(x, eps=self.eps) * scale[None, :])
        probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.num_chosen)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights * self.per_expert_scale.get_value().astype(jnp.float32)[chosen], chosen


class GroupedLinear(nnx.Module):
    """One matrix `[in, out]` per expert, applied to consecutive groups of rows."""

    def __init__(
        self,
        num_experts: int,
        in_dim: int,
        out_dim: int,
        *,
        axes: tuple[str | None, ...],
        dtype: str,
        rngs: nnx.Rngs | None,
    ):
        shape = (num_experts, in_dim, out_dim)
        weight = init_normal(rngs, shape, stddev=in_dim**-0.5, dtype=dtype)
        self.weight = nnx.Param(weight, contraction_axis=-2, axes=axes)
        self.input = HookPoint()
        self.output = HookPoint()

    def __call__(
        self, x: Float[Array, "M K"], group_sizes: Int[Array, " E"]
    ) -> Float[Array, "M N"]:
        """Projects each group of rows with its expert's matrix."""
        return self.output(ragged_contract(self.input(x), self.weight.get_value(), group_sizes))


class Experts(nnx.Module):
    """All experts; `gate_up_proj` holds the gate's columns first, then the up projection's."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None):
        count, embed, hidden = config.num_experts, config.embed_dim, config.expert_dim
        grouped: dict[str, Any] = dict(dtype=config.param_dtype, rngs=rngs)
        self.input = HookPoint(feeds=("gate_up_proj",))
        self.gate_up_proj = GroupedLinear(
            count, embed, 2 * hidden, axes=("expert", "embed", "mlp"), **grouped
        )
        self.down_proj = GroupedLinear(
            count, hidden, embed, axes=("expert", "mlp", "embed"), **grouped
        )

    def __call__(
        self, x: Float[Array, "M D"], weights: Float[Array, "M k"], chosen: Int[Array, "M k"]
    ) -> Float[Array, "M D"]:
        """The weighted sum of each token's chosen experts.

        Every token's k copies are sorted by expert, so that each expert meets one block of rows.
        """
        tokens, k = chosen.shape
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        group_sizes = jnp.bincount(chosen.reshape(-1), length=self.gate_up_proj.weight.shape[0])
        rows = self.input(x)[order // k]
        gate, up = jnp.split(self.gate_up_proj(rows, group_sizes), 2, axis=-1)
        rows = self.down_proj(jax.nn.gelu(gate, approximate=True) * up, group_sizes)
        by_token = rows[jnp.argsort(order)].reshape(tokens, k, -1)
        return jnp.einsum("MkD,Mk->MD", by_token, weights.astype(x.dtype))
