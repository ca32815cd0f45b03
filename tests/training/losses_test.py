"""The losses against their textbook forms, on real batches of a small model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.data.loader import make_loader
from gemmaqat.training import losses


@pytest.fixture(scope="module")
def batch(experiment):
    return jax.device_put(next(make_loader(experiment().data, seed=0)))


@pytest.fixture(scope="module")
def log_probs(model, batch):
    return _log_probs(model, batch)


@nnx.jit
def _log_probs(model, batch):
    out = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    return jax.nn.log_softmax(out.logits)


_next_token_loss = nnx.jit(losses.next_token_loss, static_argnames="chunk_tokens")
_kl_loss = nnx.jit(losses.kl_loss, static_argnames="chunk_tokens")


def test_next_token_loss_is_the_weighted_cross_entropy(model, batch, log_probs):
    picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
    expected = -np.sum(np.asarray(picked, np.float64) * batch["loss_weights"])
    for chunk_tokens in (0, 48):
        found = _next_token_loss(model, batch, chunk_tokens=chunk_tokens)
        np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums of 256 terms


def test_tokens_without_weight_do_not_count(model, batch):
    silent = batch | {"loss_weights": jnp.zeros_like(batch["loss_weights"])}
    assert _next_token_loss(model, silent, chunk_tokens=0) == 0


def test_kl_is_that_of_the_full_distributions(model, batch, log_probs):
    graphdef, params = nnx.split(model)
    student = nnx.merge(graphdef, jax.tree.map(lambda p: p * 1.05, params))
    ratio = log_probs - _log_probs(student, batch)
    expected = np.sum(jnp.sum(jnp.exp(log_probs) * ratio, -1) * batch["loss_weights"])
    assert expected > 0.1  # the student differs, so that the agreement below means something
    found = _kl_loss(student, model, batch, chunk_tokens=0)
    np.testing.assert_allclose(found, expected, rtol=1e-3)  # the textbook sum cancels in float32


def test_a_student_equal_to_its_teacher_has_no_kl_and_no_gradient(model, batch):
    graphdef, params = nnx.split(model)

    @jax.jit
    def loss(student, teacher):
        return losses.kl_loss(
            nnx.merge(graphdef, student), nnx.merge(graphdef, teacher), batch, chunk_tokens=0
        )

    value, (student_grads, teacher_grads) = jax.value_and_grad(loss, argnums=(0, 1))(params, params)
    assert abs(value) < 1e-4
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(student_grads)) < 1e-3
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(teacher_grads))
