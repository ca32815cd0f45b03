"""Exact parameter counts of every size, without allocating one."""

import jax
import pytest
from flax import nnx

from gemmaqat.models.sizes import MINIATURES, model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.planning.parameters import abstract_parameters, count_parameters


@pytest.mark.parametrize(
    "name, used",  # the published shapes' own counts, without layer scalars
    [
        ("e2b", 4_628_569_344),
        ("e4b", 7_463_013_376),
        ("12b", 11_907_350_272),
        ("26b_a4b", 25_233_141_760),
        ("31b", 30_697_345_280),
    ],
)
def test_full_sizes_have_exactly_the_published_parameters(name, used):
    config = model_config(name)
    assert count_parameters(config) - config.num_layers == used
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in abstract_parameters(config).values()
    )


@pytest.mark.parametrize("name", MINIATURES[:1])
def test_abstract_parameters_are_those_of_the_real_model(name):
    config = model_config(name, param_dtype="bfloat16")
    state = nnx.state(Gemma4(config, rngs=nnx.Rngs(0)), nnx.Param)
    real = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    abstract = abstract_parameters(config)
    assert abstract.keys() == real.keys()
    for path, leaf in real.items():
        assert (abstract[path].shape, abstract[path].dtype) == (leaf.shape, leaf.dtype)
