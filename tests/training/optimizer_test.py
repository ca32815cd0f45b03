"""Schedules at their corners, and each optimizer's update against its formula or its promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemmaqat.config import OPTIMIZERS, SCHEDULES, OptimizerConfig
from gemmaqat.training.optimizer import is_decayed, learning_rate, make_optimizer


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_warms_up_to_the_peak_and_ends_at_its_fraction(schedule):
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=4, final_fraction=0.1, schedule=schedule
    )
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)
    assert all(later <= earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))


def test_the_halfway_rate_tells_the_schedules_apart():
    rates = {
        name: learning_rate(
            OptimizerConfig(learning_rate=1.0, warmup_steps=0, final_fraction=0.0, schedule=name),
            25,
            101,
        )
        for name in SCHEDULES
    }
    assert rates["constant"] == 1
    assert rates["linear"] == pytest.approx(0.75)
    assert rates["cosine"] == pytest.approx(0.5 + 0.5 * np.cos(np.pi / 4))


PARAMS = {"matrix": jnp.ones((64, 64)), "norm": jnp.ones((64,)), "scalar": jnp.ones((1,))}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name):
    optimizer = make_optimizer(OptimizerConfig(name=name))
    target = jnp.linspace(-1, 1, 64 * 64).reshape(64, 64)

    def loss(params):
        return jnp.mean((params["matrix"] - target) ** 2) + jnp.sum(params["scalar"] ** 2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(lambda p, u: p - 0.02 * u, params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(40):
        params, state = step(params, state)
    assert loss(params) < 0.8 * loss(PARAMS)


def test_only_matrices_decay():
    assert is_decayed(PARAMS) == {"matrix": True, "norm": False, "scalar": False}
    optimizer = make_optimizer(OptimizerConfig(name="adamw", weight_decay=0.5))
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(PARAMS), PARAMS)
    assert (updates["matrix"] == 0.5).all()
    assert (updates["norm"] == 0).all() and (updates["scalar"] == 0).all()


def test_the_gradient_is_clipped_as_a_whole():
    optimizer = make_optimizer(OptimizerConfig(name="sgd", b1=0.0, clip_norm=0.25))
    updates, _ = jax.jit(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert optax.tree.norm(updates) == pytest.approx(0.25)


def test_state_dtype_is_that_of_the_first_moment_only():
    state = make_optimizer(OptimizerConfig(state_dtype="bfloat16")).init(PARAMS)
    adam = next(part for part in state if hasattr(part, "mu"))
    assert adam.mu["matrix"].dtype == jnp.bfloat16
    assert adam.nu["matrix"].dtype == jnp.float32


def test_adafactor_keeps_sums_of_rows_and_columns_only():
    def size(name):
        state = make_optimizer(OptimizerConfig(name=name)).init({"matrix": jnp.ones((64, 128))})
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    assert size("adamw") >= 2 * 64 * 128
    assert size("adafactor") < 64 * 128 / 16
