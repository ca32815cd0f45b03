"""Fake quantization as a map over any tree, with its own pullback."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.quantization.fake import fake_quantize
from gemmaqat.quantization.grids import fake_quantize_array
from gemmaqat.quantization.rules import resolve


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 64, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 64, rngs=rngs)])

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.embed.attend(x)


IDS = jnp.arange(8)


def setup(recipe="int2_channel_emb"):
    model = Net(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    return graph, params, resolve(recipe, model)


def test_quantized_leaves_move_to_their_grid_and_others_do_not_move():
    _, params, table = setup("int2_channel")
    out = jax.jit(lambda p: fake_quantize(p, table))(params)
    for i in range(2):
        kernel, bias = params["layers"][i]["kernel"], params["layers"][i]["bias"]
        expected = fake_quantize_array(kernel.get_value(), table[f"layers/{i}/kernel"].grid)
        np.testing.assert_array_equal(out["layers"][i]["kernel"].get_value(), expected)
        np.testing.assert_array_equal(out["layers"][i]["bias"].get_value(), bias.get_value())
        assert len(np.unique(expected[:, 0])) <= 4
    before, after = params["embed"]["embedding"], out["embed"]["embedding"]
    np.testing.assert_array_equal(after.get_value(), before.get_value())


def test_tables_are_quantized_along_their_rows():
    _, params, table = setup()
    table_row = fake_quantize(params, table)["embed"]["embedding"].get_value()[3]
    assert len(np.unique(table_row)) <= 4


def test_tree_keeps_its_type_and_metadata():
    graph, params, table = setup()
    out = fake_quantize(params, table)
    assert isinstance(out, nnx.State)
    assert jax.tree.structure(out) == jax.tree.structure(params)
    plain = nnx.to_pure_dict(params)
    from_plain = fake_quantize(plain, table)
    assert isinstance(from_plain, dict)
    jax.tree.map(np.testing.assert_array_equal, from_plain, nnx.to_pure_dict(out))
    model = fake_quantize(nnx.merge(graph, params), table)
    assert isinstance(model, Net) and model(IDS).shape == (8, 16)


def test_pullback_of_the_map_is_the_identity():
    graph, params, table = setup()
    weights, pullback = jax.vjp(lambda p: fake_quantize(p, table), params)

    def loss(weights):
        return jnp.mean(jnp.square(nnx.merge(graph, weights)(IDS)))

    at_weights = jax.grad(loss)(weights)
    (through,) = jax.jit(pullback)(at_weights)
    inside = jax.grad(lambda p: loss(fake_quantize(p, table)))(params)
    jax.tree.map(np.testing.assert_array_equal, through, at_weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), through, inside
    )
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(through))


def test_tree_and_table_must_fit():
    _, params, table = setup()
    plain = nnx.to_pure_dict(params)
    with pytest.raises(ValueError, match="embed/embedding: not in the parameters"):
        fake_quantize({"layers": plain["layers"]}, table)
    with pytest.raises(ValueError, match="extra/kernel: not in the table"):
        fake_quantize({**plain, "extra": {"kernel": jnp.ones((2, 2))}}, table)
    with pytest.raises(ValueError, match=r"embed/embedding: shape \(2, 64\)"):
        fake_quantize({**plain, "embed": {"embedding": jnp.ones((2, 64))}}, table)
