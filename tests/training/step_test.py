"""The compiled programs: what they compute, how often they compile, what they consume."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gemmaqat.data.loader import make_loader
from gemmaqat.quantization.fake import fake_quantize
from gemmaqat.quantization.rules import resolve
from gemmaqat.training import losses
from gemmaqat.training.loop import fit
from gemmaqat.training.step import _update, make_programs, split_batch


@pytest.fixture(scope="module")
def params(model):
    return nnx.split(model)[1]


@pytest.fixture(scope="module")
def batch(experiment):
    return jax.device_put(next(make_loader(experiment().data, seed=0)))


def _worst(left, right):
    """Largest difference of any leaf, relative to the largest entry of all."""
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(right))
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return max(jnp.abs(a - b).max() for a, b in pairs) / scale


def test_the_gradient_through_the_map_is_that_taken_inside(model, params, table, programs, batch):
    quantize = programs.quantize_map(table)
    weights, pullback = quantize.forward(params)
    grads, value = programs.next_token(weights, split_batch(jax.device_get(batch), 1))
    grads = quantize.backward(pullback, grads)

    @jax.jit
    @jax.value_and_grad
    def inside(params):
        quantized = nnx.merge(nnx.split(model)[0], fake_quantize(params, table))
        loss = losses.next_token_loss(quantized, batch, chunk_tokens=0)
        return loss / jnp.sum(batch["loss_weights"])

    expected_value, expected = inside(params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert _worst(grads, expected) < 1e-5  # float32, another order of operations


def test_micro_batches_sum_to_the_whole_batch(params, programs, batch):
    whole, whole_value = programs.next_token(params, split_batch(jax.device_get(batch), 1))
    parts, value = programs.next_token(params, split_batch(jax.device_get(batch), 4))
    np.testing.assert_allclose(value, whole_value, rtol=1e-5)
    assert _worst(parts, whole) < 1e-5  # float32 sums in another order


def test_the_update_consumes_its_inputs(params, programs):
    own = jax.tree.map(jnp.copy, params)
    state = programs.init(own)
    grads = jax.tree.map(jnp.ones_like, own)
    updated, _, status = programs.update(own, state, grads, jnp.float32(0.01))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((own, state)) if leaf.size > 1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, updated)))
    assert status.finite.all()


@pytest.mark.parametrize(
    "value, gradient, finite",
    [
        (1.0, 1.0, [True, True]),
        (1.0, np.inf, [False, False]),
        (-3e38, 1.0, [False, True]),  # the update is too much
        (1.0, 1e30, [True, False]),  # the square of the gradient is, and the update is nothing
    ],
)
def test_the_flags_cover_gradient_update_and_optimizer(value, gradient, finite):
    adam = optax.scale_by_adam()
    params, grads = {"w": jnp.full((2,), value)}, {"w": jnp.full((2,), gradient)}
    status = _update(adam, params, adam.init(params), grads, jnp.float32(3e38))[2]
    assert status.finite.tolist() == finite


def test_arms_of_one_loss_share_one_program(model, experiment, tmp_path):
    """Float, two tables and a delayed start; both losses: five runs, each program compiled once."""
    section = experiment()
    programs = make_programs(nnx.split(model)[0], section.train, section.optimizer)
    tables = {name: resolve(name, model) for name in ("int4_channel", "int2_channel")}
    arms = (
        ("float", "none", None, 0),
        ("int4", "qat", tables["int4_channel"], 0),
        ("int2_delayed", "qat", tables["int2_channel"], 2),
        ("int4_distill", "distill", tables["int4_channel"], 0),
        ("int2_distill", "distill", tables["int2_channel"], 1),
    )
    for name, method, table, start_step in arms:
        arm = experiment(train=dict(num_steps=3, start_step=start_step, eval_sequences=4))
        fit(
            model=model,
            table=table,
            method=method,
            experiment=arm,
            workdir=tmp_path / name,
            programs=programs,
        )
    compiled = {
        name: getattr(programs, name)._cache_size()
        for name in ("next_token", "kl", "next_token_sum", "kl_sum", "update", "init")
    }
    assert compiled == dict.fromkeys(compiled, 1)
    maps = [programs.quantize_map(table) for table in tables.values()]
    assert len(programs._maps) == 2
    assert [(m.forward._cache_size(), m.backward._cache_size()) for m in maps] == [(1, 1)] * 2


def test_programs_of_other_settings_are_refused(model, experiment, run, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer\.b1=0\.9, the run has 0\.5"):
        run(tmp_path / "run", experiment(optimizer=dict(b1=0.5)))
    assert not (tmp_path / "run").exists()


def test_the_map_of_a_table_is_quantization_itself(params, table, programs):
    weights, _ = programs.quantize_map(table).forward(params)
    expected = jax.jit(functools.partial(fake_quantize, table=table))(params)
    assert _worst(weights, expected) == 0
    assert _worst(weights, params) > 0.01
