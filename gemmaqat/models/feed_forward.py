"""The dense feed-forward branch: a GeGLU without bias."""

from typing import Any

import jax
from flax import nnx

from gemmaqat.models.config import ModelConfig
from gemmaqat.models.layers import HookPoint, Linear
from gemmaqat.typing import Activations


class FeedForward(nnx.Module):
    """`(gelu(x @ gate) * (x @ up)) @ down`, with the tanh form of gelu."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs | None):
        hidden = config.layer_mlp_dim(layer)
        linear: dict[str, Any] = dict(dtype=config.param_dtype, rngs=rngs)
        self.input = HookPoint(feeds=("gate_proj", "up_proj"))
        self.gate_proj = Linear(config.embed_dim, hidden, axes=("embed", "mlp"), **linear)
        self.up_proj = Linear(config.embed_dim, hidden, axes=("embed", "mlp"), **linear)
        self.down_proj = Linear(hidden, config.embed_dim, axes=("mlp", "embed"), **linear)

    def __call__(self, x: Activations) -> Activations:
        """The branch, without the norms around it."""
        x = self.input(x)
        return self.down_proj(jax.nn.gelu(self.gate_proj(x), approximate=True) * self.up_proj(x))
