"""The sizes table: parameter counts, names and paths."""

import math

import jax
import pytest
from flax import nnx

from gemmaqat.models.config import ModelConfig
from gemmaqat.models.sizes import MINIATURES, model_config
from gemmaqat.models.transformer import Gemma4


def count(name):
    state = nnx.state(Gemma4(model_config(name), rngs=None), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


# Exact parameters read by the text forward pass, plus one layer scalar per layer.
@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("e2b", 4_628_569_344, 35),
        ("e4b", 7_463_013_376, 42),
        ("12b", 11_907_350_272, 48),
        ("26b_a4b", 25_233_141_760, 30),
        ("31b", 30_697_345_280, 60),
    ],
)
def test_parameter_counts_equal_the_released_models(name, parameters, layers):
    assert count(name) == parameters + layers


@pytest.mark.parametrize("name", MINIATURES)
def test_miniatures_stay_below_their_limit(name):
    assert count(name) <= 800_000


def test_unknown_size_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean '26b_a4b'"):
        model_config("26b_a4")


def test_config_of_another_family_is_refused():
    with pytest.raises(ValueError, match=r"config.json: model_type is 'llama', expected a Gemma 4"):
        ModelConfig.from_hf({"model_type": "llama"}, name="x", where="config.json")


@pytest.mark.parametrize("name", ["e2b", "e4b", "12b", "26b_a4b", "31b"])
def test_hugging_face_configuration_round_trips(name):
    config = model_config(name)
    assert ModelConfig.from_hf(config.to_hf(), name=name, where="here") == config
