"""The sizes table: parameter counts, names and paths."""

import math

import jax
import pytest
from flax import nnx

from gemmaqat.models.config import FULL, SLIDING, ModelConfig
from gemmaqat.models.sizes import MINIATURES, SIZES, model_config
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


@pytest.mark.parametrize("name", SIZES)
def test_sharing_begins_after_a_full_attention_layer(name):
    """As in every released model: llama.cpp and google-deepmind/gemma read the pair before it."""
    config = model_config(name)
    if config.num_kv_shared_layers:
        before = config.layer_types[config.first_shared_layer - 2 : config.first_shared_layer]
        assert before == (SLIDING, FULL)


def test_unknown_size_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean '26b_a4b'"):
        model_config("26b_a4")


def test_config_of_another_family_is_refused():
    with pytest.raises(ValueError, match=r"config.json: model_type is 'llama', expected a Gemma 4"):
        ModelConfig.from_hf({"model_type": "llama"}, name="x", where="config.json")


@pytest.mark.parametrize("name", SIZES)
def test_hugging_face_configuration_round_trips(name):
    config = model_config(name, stop_ids=(1, 106))
    assert ModelConfig.from_hf(config.to_hf(), name=name, where="here") == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_activation", "relu", "hidden_activation is 'relu', expected 'gelu_pytorch_tanh'"),
        ("attention_bias", True, "attention_bias is True"),
        ("num_hidden_layers", 99, "num_hidden_layers is 99, expected 35"),
        ("text_config", [1], "text_config is"),
        ("hidden_size", None, "'hidden_size' is missing"),
        ("hidden_size", 0, "embed_dim=0, expected a number from 1 up"),
        ("head_dim", 255, "head_dim=255 is odd"),
        ("sliding_window", 2**40, "sliding_window=1099511627776, expected a number"),
        ("num_kv_shared_layers", 40, "num_kv_shared_layers=40 of 35"),
    ],
)
def test_configurations_that_cannot_be_computed_are_refused(field, value, message):
    config = model_config("e2b").to_hf() | {field: value}
    if value is None:
        del config[field]
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(config, name="x", where="config.json")


def test_lists_and_nulls_of_token_ids_are_read():
    config = model_config("e2b").to_hf() | {"eos_token_id": [1, 106], "pad_token_id": None}
    read = ModelConfig.from_hf(config, name="x", where="here")
    assert (read.eos_id, read.stop_ids, read.pad_id) == (1, (1, 106), 0)
