"""The parameters of a model without allocating any: paths, shapes, dtypes and exact counts."""

import functools
import math

import jax
from flax import nnx

from gemmaqat.models.config import ModelConfig
from gemmaqat.models.transformer import Gemma4


@functools.lru_cache(maxsize=16)
def abstract_model(config: ModelConfig) -> Gemma4:
    """The model with a `jax.ShapeDtypeStruct` in place of every array."""
    return Gemma4(config, rngs=None)


def abstract_parameters(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by path, for example `layers/3/mlp/up_proj/weight`."""
    state = nnx.state(abstract_model(config), nnx.Param)
    return {
        "/".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in nnx.to_flat_state(state)
    }


def count_parameters(config: ModelConfig) -> int:
    """Every stored number of the model, layer scalars included; the tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in abstract_parameters(config).values())
