"""Precision, rematerialisation and names of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.models.sizes import MINIATURES, model_config
from gemmaqat.models.transformer import Gemma4


def paths(name):
    state = nnx.state(Gemma4(model_config(name), rngs=None), nnx.Param)
    return ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]


def test_only_parameters_live_in_the_model():
    for name in MINIATURES:
        state = nnx.state(Gemma4(model_config(name), rngs=None))
        assert all(isinstance(v, nnx.Param) for _, v in nnx.to_flat_state(state)), name


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(remat):
    tokens = jnp.arange(40)[None] + 3

    def gradient(policy):
        config = model_config("26b_a4b_mini", remat=policy)
        graphdef, params = nnx.split(Gemma4(config, rngs=nnx.Rngs(0)))
        loss = lambda p: jnp.mean(nnx.merge(graphdef, p)(tokens).logits ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    for a, b in zip(*(jax.tree.leaves(gradient(p)) for p in ("none", remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    config = model_config("e2b_mini", dtype="bfloat16")
    model = Gemma4(config, rngs=nnx.Rngs(0))
    wide = Gemma4(model_config("e2b_mini"), rngs=nnx.Rngs(0))
    tokens = jnp.arange(40)[None] + 3
    out = model(tokens)
    assert out.hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(model)))
    # bfloat16 has 8 significant bits; logits have standard deviation 1 here.
    assert np.abs(out.logits - wide(tokens).logits).mean() < 0.05


@pytest.mark.parametrize("name", MINIATURES)
def test_module_paths_equal_the_golden_list(name, request):
    """Paths are what rules match and checkpoints store: changing one breaks both."""
    golden = request.path.parents[1] / "golden" / "paths" / f"{name}.txt"
    assert paths(name) == golden.read_text().split(), (
        f"module paths changed; if that is meant, write them to {golden.name} and say so"
    )
