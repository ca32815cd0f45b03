"""google-deepmind/gemma itself loads our Orbax folders and computes our logits, and the reverse.

The library wants Python 3.12 and dependencies of its own, so it runs in another interpreter: name
one that has it, as in `GEMMA_PYTHON=~/venvs/gemma/bin/python pytest -m interop <this file>`.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.orbax_gemma import read_orbax, write_orbax
from gemmaqat.interop.source import of_model, to_model
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve

PYTHON = os.environ.get("GEMMA_PYTHON", "")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PYTHON, reason="GEMMA_PYTHON names no interpreter with `gemma`"),
]

# The library shares keys from the last period before the shared layers, so whole periods share.
MODELS = {
    "e2b": model_config("e2b_mini"),
    "e4b": model_config("e4b_mini"),
    "26b_a4b": model_config("26b_a4b_mini"),
    "31b": model_config("31b_mini"),
}
STACKED = ("e4b", "31b")  # E2B's layers differ; the library's loader mixes up stacked experts
# Float32 on both sides; their router takes an approximate top k, exact on a CPU. Measured: at most
# 3.6e-5 where their model was made at random, 5.5e-6 where ours was.
TOLERANCE = 1e-4


def _library(mode: str, folder: Path, config, tokens: np.ndarray, scratch: Path) -> np.ndarray:
    np.save(scratch / "tokens.npy", tokens)
    (scratch / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    program = Path(__file__).with_name("gemma_library.py")
    names = [folder, scratch / "config.json", scratch / "tokens.npy", scratch / "logits.npy"]
    command = [PYTHON, program, mode, *names]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return np.load(scratch / "logits.npy")


def _tokens(config) -> np.ndarray:
    # longer than twice the window
    return np.random.default_rng(0).integers(3, config.vocab_size, (2, 80)).astype(np.int32)


def _logits(model: Gemma4, tokens: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(nnx.jit(lambda m, t: m(t).logits)(model, jnp.asarray(tokens)))


def _random_model(config) -> Gemma4:
    """Every parameter, norms and scalars too, away from its initial value.

    But the experts' input norm is constant: version 4.0.1 of the library gives the router the
    normed input of the experts, where transformers gives it the residual stream. Under a constant
    norm, which the router's own norm removes, both are one model.
    """
    model = Gemma4(config, rngs=nnx.Rngs(0))
    keys = nnx.Rngs(1)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable.get_value()
        if "pre_feedforward_layernorm_2" in path:
            variable.set_value(jnp.full(value.shape, 1.25))
        else:
            variable.set_value(value + 0.1 * jax.random.normal(keys(), value.shape))
    return model


@pytest.mark.parametrize("layout", ["plain", "stacked"])
@pytest.mark.parametrize("name", MODELS)
def test_the_library_computes_our_logits_from_our_folder(name, layout, tmp_path):
    if layout == "stacked" and name not in STACKED:
        pytest.skip(f"{name} has no stacked form that the library loads")
    config = MODELS[name]
    model = _random_model(config)
    table = resolve("q4_0", model)
    packed = convert(model, table)
    folder = tmp_path / "out"
    folder.mkdir()
    options = ExportOptions(float_dtype="float32", stacked_layers=layout == "stacked")
    write_orbax(of_model(packed, table), folder, options)
    tokens = _tokens(config)
    theirs = _library("logits", folder, config, tokens, tmp_path)
    ours = _logits(packed, tokens)
    assert ours.std() > 0.5
    assert np.abs(theirs - ours).max() <= TOLERANCE, np.abs(theirs - ours).max()


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_the_library_saved_gives_its_logits_here(name, tmp_path):
    config = MODELS[name]
    tokens = _tokens(config)
    theirs = _library("make", tmp_path / "theirs", config, tokens, tmp_path)
    shipment = read_orbax(tmp_path / "theirs", config=config)
    if config.num_kv_shared_layers:  # their module saves keys that nobody reads
        assert len(shipment.carried) == 3 * config.num_kv_shared_layers
    ours = _logits(to_model(shipment), tokens)
    assert theirs.std() > 0.5
    assert np.abs(theirs - ours).max() <= TOLERANCE, np.abs(theirs - ours).max()
