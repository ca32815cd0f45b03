"""One decoder block: attention, feed-forward (with experts in the 26B), per-layer embedding."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from gemmaqat.models.attention import Attention, AttentionOutput, Surroundings
from gemmaqat.models.cache import KeyValues
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.experts import Experts, Router
from gemmaqat.models.feed_forward import FeedForward
from gemmaqat.models.layers import Linear, RMSNorm, init_constant
from gemmaqat.typing import Activations, Positions, SegmentIds

_REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@dataclasses.dataclass
class Context:
    """What the blocks of one pass share. Each block leaves here what later ones read."""

    positions: Positions
    segment_ids: SegmentIds | None
    rope: dict[str, Any]  # layer type -> cosine and sine
    per_layer_inputs: Float[Array, "B T L P"] | None
    cache: list[KeyValues | None] | None  # per layer; replaced by the extended one
    shared: dict[str, KeyValues]  # layer type -> keys of the last block that owned some


class Block(nnx.Module):
    """Residual branches with norms before and after each, and one scalar on the whole stream."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs | None):
        norm: dict[str, Any] = dict(eps=config.rms_norm_eps, dtype=config.param_dtype, rngs=rngs)
        self.index = layer
        self.kind = config.layer_types[layer]
        self.remat = config.remat
        dim = config.embed_dim
        self.input_layernorm = RMSNorm(dim, **norm)
        self.self_attn = Attention(config, layer, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(dim, **norm)
        self.pre_feedforward_layernorm = RMSNorm(dim, **norm)
        self.mlp = FeedForward(config, layer, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(dim, **norm)
        self.has_experts = config.num_experts > 0
        if self.has_experts:
            self.router = Router(config, rngs=rngs)
            self.experts = Experts(config, rngs=rngs)
            self.post_feedforward_layernorm_1 = RMSNorm(dim, **norm)  # after the dense branch
            self.pre_feedforward_layernorm_2 = RMSNorm(dim, **norm)  # before the experts
            self.post_feedforward_layernorm_2 = RMSNorm(dim, **norm)  # after the experts
        self.has_per_layer_input = config.per_layer_dim > 0
        if self.has_per_layer_input:
            linear: dict[str, Any] = dict(dtype=config.param_dtype, rngs=rngs)
            width = config.per_layer_dim
            self.per_layer_input_gate = Linear(dim, width, axes=("embed", None), **linear)
            self.per_layer_projection = Linear(width, dim, axes=(None, "embed"), **linear)
            self.post_per_layer_input_norm = RMSNorm(dim, **norm)
        self.layer_scalar = nnx.Param(
            init_constant(rngs, (1,), value=1.0, dtype=config.param_dtype), axes=(None,)
        )

    def __call__(self, x: Activations, context: Context) -> Activations:
        """The stream after this block."""
        inputs, cache = context.per_layer_inputs, context.cache
        forward = Block._forward
        if self.remat != "none":
            forward = nnx.remat(forward, policy=_REMAT_POLICIES[self.remat])
        result = forward(
            self,
            x,
            None if inputs is None else inputs[:, :, self.index, :],
            Surroundings(
                positions=context.positions,
                segment_ids=context.segment_ids,
                rope=context.rope[self.kind],
                shared=None if self.self_attn.owns_kv else context.shared[self.kind],
                cache=None if cache is None else cache[self.index],
            ),
        )
        context.shared[self.kind] = result.keys
        if cache is not None:
            cache[self.index] = result.cache
        return result.x

    def _forward(
        self, x: Activations, per_layer_input: Float[Array, "B T P"] | None, around: Surroundings
    ) -> AttentionOutput:
        attention = self.self_attn(self.input_layernorm(x), around)
        x = x + self.post_attention_layernorm(attention.x)
        x = x + self.post_feedforward_layernorm(self._feed_forward(x))
        if per_layer_input is not None:
            gate = jax.nn.gelu(self.per_layer_input_gate(x), approximate=True) * per_layer_input
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gate))
        x = x * self.layer_scalar.get_value().astype(x.dtype)[None, None, :]
        return AttentionOutput(x, attention.keys, attention.cache)

    def _feed_forward(self, x: Activations) -> Activations:
        """The dense branch, beside it the experts where there are any; before the last norm."""
        y = self.mlp(self.pre_feedforward_layernorm(x))
        if not self.has_experts:
            return y
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows)
        expert_rows = self.experts(self.pre_feedforward_layernorm_2(rows), weights, chosen)
        return self.post_feedforward_layernorm_1(y) + self.post_feedforward_layernorm_2(
            expert_rows.reshape(x.shape)
        )
