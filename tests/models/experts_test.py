"""The real router and its 128 experts, against a float64 loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.kernels.ragged import ragged_matmul, row_tiles, tile_rows
from gemmaqat.models.experts import Experts, Router
from gemmaqat.models.sizes import model_config


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_128_experts_top_8_equal_a_loop_over_tokens():
    config = model_config(
        "26b_a4b_mini", num_experts=128, num_experts_per_token=8, embed_dim=32, expert_dim=16
    )
    rngs = nnx.Rngs(0)
    router, experts = Router(config, rngs=rngs), Experts(config, rngs=rngs)
    rng = np.random.default_rng(1)
    router.scale.set_value(jnp.asarray(rng.uniform(0.5, 2, 32), jnp.float32))
    router.per_expert_scale.set_value(jnp.asarray(rng.uniform(0.5, 2, 128), jnp.float32))
    x, t = (jnp.asarray(rng.normal(size=(24, 32)), jnp.float32) for _ in range(2))
    weights, chosen = router(x)
    y = experts(t, weights, chosen)

    x64, t64 = np.asarray(x, np.float64), np.asarray(t, np.float64)
    value = lambda param: np.asarray(param.get_value(), np.float64)  # noqa: E731
    z = x64 / np.sqrt(np.mean(x64**2, -1, keepdims=True) + 1e-6)
    z = z * value(router.scale) * 32**-0.5
    scores = z @ value(router.proj.weight)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    for i in range(len(x64)):
        top = np.argsort(-p[i])[:8]
        gap = np.sort(p[i])[-8] - np.sort(p[i])[-9]
        assert set(np.asarray(chosen[i])) == set(top), f"token {i}, gap {gap:.3g}"
        w = p[i][top] / p[i][top].sum() * value(router.per_expert_scale)[top]
        np.testing.assert_allclose(np.sort(weights[i]), np.sort(w), rtol=2e-5)
        want = np.zeros(32)
        for weight, e in zip(w, top, strict=True):
            gate, up = np.split(t64[i] @ value(experts.gate_up_proj.weight)[e], 2)
            want += weight * ((gelu(gate) * up) @ value(experts.down_proj.weight)[e])
        np.testing.assert_allclose(y[i], want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "sizes", [[5, 0, 11, 1], [17, 0, 0, 0], [0, 0, 0, 17], [4, 4, 4, 5]], ids=str
)
def test_grouped_product_and_gradients_equal_a_loop_over_groups(sizes):
    rng = np.random.default_rng(2)
    x, w, g = rng.normal(size=(17, 6)), rng.normal(size=(4, 6, 5)), rng.normal(size=(17, 5))
    group = np.repeat(np.arange(4), sizes)
    args = [jnp.asarray(a, jnp.float32) for a in (x, w)]
    y, pullback = jax.vjp(lambda x, w: ragged_matmul(x, w, jnp.asarray(sizes)), *args)
    dx, dw = pullback(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(y, np.einsum("mk,mkn->mn", x, w[group]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("mn,mkn->mk", g, w[group]), rtol=1e-4, atol=1e-5)
    want = np.zeros_like(w)
    for row, e in enumerate(group):
        want[e] += np.outer(x[row], g[row])
    np.testing.assert_allclose(dw, want, rtol=1e-4, atol=1e-5)


def test_tiles_hold_every_row_once_and_belong_to_one_group():
    rng = np.random.default_rng(3)
    for _ in range(20):
        sizes = rng.multinomial(200, rng.dirichlet(np.full(16, 0.3)))
        tile = tile_rows(200, 16)
        groups, rows = row_tiles(jnp.asarray(sizes), 200, tile)
        filled = np.asarray(rows) < 200
        assert sorted(np.asarray(rows)[filled]) == list(range(200))
        owner = np.repeat(np.arange(16), sizes)
        for e, row, ok in zip(np.asarray(groups), np.asarray(rows), filled, strict=True):
            assert (owner[row[ok]] == e).all()
