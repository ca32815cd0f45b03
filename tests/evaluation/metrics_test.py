"""Chunked token metrics equal the dense computation and stay exact in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmaqat.evaluation import metrics

B, T, D, V = 2, 7, 8, 33
CHUNKS = pytest.mark.parametrize("chunk_tokens", [0, 2, 6, 100], ids=lambda n: f"chunk{n}")


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return dict(
        table=array(D, V),
        hidden=array(B, T, D),
        reference_table=array(D + 2, V),
        reference_hidden=array(B, T, D + 2),
        targets=jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32),
        weights=array(B, T),
    )


def head_of(table):
    return lambda hidden: 5.0 * jnp.tanh(hidden @ table / 5.0)


def dense_nll(table, hidden, targets):
    log_q = jax.nn.log_softmax(head_of(table)(hidden), axis=-1)
    return -jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]


def dense_kl(table, hidden, reference_table, reference_hidden):
    log_p = jax.nn.log_softmax(head_of(reference_table)(reference_hidden), axis=-1)
    log_q = jax.nn.log_softmax(head_of(table)(hidden), axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


@CHUNKS
def test_nll_and_its_gradients_equal_the_dense_ones(case, chunk_tokens):
    def chunked(table, hidden):
        nll = metrics.token_nll(head_of(table), hidden, case["targets"], chunk_tokens=chunk_tokens)
        return jnp.sum(nll * case["weights"]), nll

    def dense(table, hidden):
        nll = dense_nll(table, hidden, case["targets"])
        return jnp.sum(nll * case["weights"]), nll

    assert_same_value_and_gradient(chunked, dense, case["table"], case["hidden"])


@CHUNKS
def test_kl_and_its_gradients_equal_the_dense_ones(case, chunk_tokens):
    reference = case["reference_table"], case["reference_hidden"]

    def chunked(table, hidden):
        kl = metrics.token_kl(
            head_of(table), hidden, head_of(reference[0]), reference[1], chunk_tokens=chunk_tokens
        )
        return jnp.sum(kl * case["weights"]), kl

    def dense(table, hidden):
        kl = dense_kl(table, hidden, *reference)
        return jnp.sum(kl * case["weights"]), kl

    assert_same_value_and_gradient(chunked, dense, case["table"], case["hidden"])


def assert_same_value_and_gradient(chunked, dense, *arguments):
    take = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*arguments)  # noqa: E731
    ((_, values), gradients), ((_, dense_values), dense_gradients) = take(chunked), take(dense)
    # Float32 sums in another order: measured at most 3e-6.
    np.testing.assert_allclose(values, dense_values, rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradients, dense_gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_reference_of_a_kl_gets_no_gradient(case):
    def loss(reference_table):
        head = head_of(case["table"])
        kl = metrics.token_kl(
            head, case["hidden"], head_of(reference_table), case["reference_hidden"], chunk_tokens=2
        )
        return jnp.sum(kl)

    assert not np.any(jax.grad(loss)(case["reference_table"]))


@CHUNKS
def test_comparison_gives_what_the_single_functions_give(case, chunk_tokens):
    head = head_of(case["table"])
    other = head_of(case["reference_table"])
    references = [(other, case["reference_hidden"]), (head, case["hidden"])]
    found = metrics.token_comparison(
        head, case["hidden"], case["targets"], references, chunk_tokens=chunk_tokens
    )
    np.testing.assert_allclose(
        found.nll, dense_nll(case["table"], case["hidden"], case["targets"]), atol=1e-5
    )
    expected_kl = dense_kl(
        case["table"], case["hidden"], case["reference_table"], case["reference_hidden"]
    )
    np.testing.assert_allclose(found.kl[..., 0], expected_kl, atol=1e-5)
    np.testing.assert_array_equal(found.kl[..., 1], 0.0)
    best = np.argmax(head(case["hidden"]), axis=-1)
    reference_best = np.argmax(other(case["reference_hidden"]), axis=-1)
    np.testing.assert_array_equal(found.correct, best == case["targets"])
    np.testing.assert_array_equal(found.agree[..., 0], best == reference_best)
    assert np.all(found.agree[..., 1])
    assert not np.array_equal(best, reference_best)


def test_comparison_without_references_has_no_kl(case):
    found = metrics.token_comparison(
        head_of(case["table"]), case["hidden"], case["targets"], [], chunk_tokens=4
    )
    assert found.kl.shape == found.agree.shape == (B, T, 0)


def test_small_kl_keeps_its_digits_where_the_textbook_sum_loses_them():
    rng = np.random.default_rng(1)
    p_logits = 5 * rng.normal(size=(64, 4096))
    # Differences of 1e-4 give a KL near 5e-9: below the rounding error of a float32 log-softmax.
    q_logits = p_logits + 1e-4 * rng.normal(size=p_logits.shape)
    exact = kl_in_float64(p_logits.astype(np.float32), q_logits.astype(np.float32))
    identity = lambda logits: logits  # noqa: E731
    found = metrics.token_kl(
        identity,
        jnp.asarray(q_logits, jnp.float32)[None],
        identity,
        jnp.asarray(p_logits, jnp.float32)[None],
        chunk_tokens=0,
    )
    np.testing.assert_allclose(found[0], exact, rtol=2e-2)  # measured 4e-3
    assert np.all(found > 0)


def kl_in_float64(p_logits, q_logits):
    def log_softmax(x):
        x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
        return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))

    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def test_kl_and_gradient_are_finite_for_extreme_and_masked_logits():
    p = jnp.asarray([[[0.0, -jnp.inf, 300.0, -300.0], [0.0, 1.0, 2.0, 3.0]]])
    q = jnp.asarray([[[300.0, -jnp.inf, -300.0, 0.0], [0.0, 1.0, 2.0, 3.0]]])
    identity = lambda logits: logits  # noqa: E731
    kl = lambda q: metrics.token_kl(identity, q, identity, p, chunk_tokens=0)  # noqa: E731
    np.testing.assert_allclose(kl(q)[0], [600.0, 0.0])
    gradient = jax.grad(lambda q: jnp.sum(kl(q)))(q)
    np.testing.assert_allclose(gradient[0], [[1.0, 0.0, -1.0, 0.0], [0.0] * 4], atol=1e-6)


def test_logits_of_all_tokens_never_exist(case):
    """The widest array of the jaxpr, gradients included, is one chunk of logits or the table."""
    hidden = jnp.zeros((2, 64, D))
    targets = jnp.zeros((2, 64), jnp.int32)

    def loss(table, hidden):
        return jnp.sum(metrics.token_nll(head_of(table), hidden, targets, chunk_tokens=16))

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(case["table"], hidden)
    wide = [shape for shape in shapes_in(jaxpr.jaxpr) if V in shape]
    assert wide, "the walk found no logits at all"
    assert max(int(np.prod(shape)) for shape in wide) <= max(16 * V, D * V)


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_bfloat16_hidden_states_are_scored_in_float32(case):
    head = lambda hidden: hidden @ case["table"].astype(jnp.bfloat16)  # noqa: E731
    nll = metrics.token_nll(
        head, case["hidden"].astype(jnp.bfloat16), case["targets"], chunk_tokens=4
    )
    assert nll.dtype == jnp.float32


def test_negative_chunk_is_refused(case):
    with pytest.raises(ValueError, match="chunk_tokens=-1"):
        metrics.token_nll(head_of(case["table"]), case["hidden"], case["targets"], chunk_tokens=-1)
