"""A cached pass equals the full pass, however the tokens are cut into chunks and padded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.models.attention import attend, attend_plainly
from gemmaqat.models.cache import init_cache
from gemmaqat.models.config import FULL, SLIDING
from gemmaqat.models.sizes import SIZES, model_config
from gemmaqat.models.transformer import Gemma4

WINDOW = 8
LENGTH = 40  # five windows


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, tokens, positions, cache):
    return nnx.merge(graphdef, params)(tokens, positions, cache=cache)


@pytest.fixture(scope="module")
def split():
    """Per-layer embeddings and shared keys: the size with the most cache paths."""
    config = model_config("e2b_mini", sliding_window=WINDOW)
    return nnx.split(Gemma4(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 128, (3, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def full_logits(split, tokens):
    return np.asarray(nnx.merge(*split)(jnp.asarray(tokens)).logits)


def chunked(split, tokens, positions, lengths):
    """Logits of a pass in chunks of the given lengths."""
    config = nnx.merge(*split).config
    cache = init_cache(config, batch_size=len(tokens), max_length=LENGTH, dtype="float32")
    logits, start = [], 0
    for length in lengths:
        at = slice(start, start + length)
        out = run(*split, tokens[:, at], positions[:, at], cache)
        cache, start = out.cache, start + length
        logits.append(out.logits)
    return np.concatenate(logits, axis=1), cache


# Each list ends a chunk inside, at and beyond the window edge; (4, 36) writes a chunk longer than
# twice the window into a half-full ring, (13, 27) into a full one.
@pytest.mark.parametrize(
    "lengths", [(LENGTH,), (4, 36), (13, 27), (8, 8, 8, 8, 8), (20, *[1] * 20)], ids=str
)
def test_chunks_equal_the_full_pass(split, tokens, full_logits, lengths):
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    logits, _ = chunked(split, tokens, positions, lengths)
    np.testing.assert_allclose(logits, full_logits, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths_decode_as_if_alone(split, tokens, full_logits, side):
    """Prompts of 5, 9 and 13 tokens in one padded prefill of 13, then 20 single steps."""
    prompt, steps = [5, 9, 13], 20
    width = max(prompt)
    ids = np.zeros((3, width), np.int32)
    positions = np.full((3, width), -1, np.int32)
    for row, length in enumerate(prompt):
        at = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, at], positions[row, at] = tokens[row, :length], np.arange(length)
    config = nnx.merge(*split).config
    cache = init_cache(config, batch_size=3, max_length=LENGTH, dtype="float32")
    out = run(*split, ids, positions, cache)
    for row, length in enumerate(prompt):
        last = width - 1 if side == "left" else length - 1
        np.testing.assert_allclose(out.logits[row, last], full_logits[row, length - 1], atol=2e-5)
    for step in range(steps):
        at = np.array(prompt) + step
        out = run(
            *split, tokens[np.arange(3), at][:, None], at[:, None].astype(np.int32), out.cache
        )
        np.testing.assert_allclose(out.logits[:, 0], full_logits[np.arange(3), at], atol=2e-5)


def test_last_logits_are_those_of_the_last_document(split, tokens, full_logits):
    """In a packed row, too, where an earlier document is the longer one."""
    model = nnx.merge(*split)
    segments = np.repeat([[1, 2, 0]], [25, 10, 5], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(25), np.arange(10), np.full(5, -1)])[None]
    both = np.concatenate([tokens[1:2, :25], tokens[:1, :15]], axis=1)
    args = (jnp.asarray(both), jnp.asarray(positions, jnp.int32), jnp.asarray(segments))
    out = model(*args, logits="last")
    np.testing.assert_allclose(out.logits[0, 0], full_logits[0, 9], atol=2e-5)


def test_last_logits_are_those_of_the_last_valid_token(split, tokens, full_logits):
    positions = np.where(np.arange(LENGTH) < [[5], [9], [LENGTH]], np.arange(LENGTH), -1)
    model = nnx.merge(*split)
    out = model(jnp.asarray(tokens), jnp.asarray(positions, jnp.int32), logits="last")
    wanted = full_logits[np.arange(3), [4, 8, LENGTH - 1]]
    np.testing.assert_allclose(out.logits[:, 0], wanted, atol=2e-5)


def test_shared_layers_own_nothing_and_rings_hold_one_window(split):
    cache = init_cache(nnx.merge(*split).config, batch_size=2, max_length=LENGTH, dtype="float32")
    assert [None if x is None else x.k.shape[1] for x in cache.layers] == [
        WINDOW,
        LENGTH,
        None,
        None,
    ]


# Section 3 of the model description: elements per position and owning layers of each kind.
@pytest.mark.parametrize(
    ("size", "per_token", "windows"),
    [
        ("e2b", 6_144, 6_291_456),
        ("e4b", 16_384, 20_971_520),
        ("12b", 16_384, 335_544_320),
        ("26b_a4b", 20_480, 209_715_200),
        ("31b", 81_920, 838_860_800),
    ],
)
def test_cache_bytes_of_the_full_sizes_equal_the_formula(size, per_token, windows):
    length = 4_096
    config = model_config(size)
    make = functools.partial(init_cache, config, batch_size=1, max_length=length, dtype="bfloat16")
    cache = jax.eval_shape(make)
    nbytes = lambda x: x.size * x.dtype.itemsize  # noqa: E731
    kv = sum(nbytes(x.k) + nbytes(x.v) for x in cache.layers if x is not None)
    assert kv == per_token * length + windows
    slots = sum(
        min(length, config.sliding_window) if config.is_sliding(i) else length
        for i in range(config.num_layers)
        if config.owns_kv(i)
    )
    assert sum(nbytes(x.positions) for x in cache.layers if x is not None) == 4 * slots


def test_positions_beyond_the_cache_are_refused(split, tokens):
    model = nnx.merge(*split)
    cache = model.init_cache(batch_size=3, max_length=16)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    with pytest.raises(ValueError, match="position 39 lies beyond the cache of 16 positions"):
        model(jnp.asarray(tokens), positions, cache=cache)
    with pytest.raises(ValueError, match="without positions"):
        model(jnp.asarray(tokens), cache=cache)


def test_traced_positions_beyond_the_cache_give_nan(split, tokens):
    """Where no error can be raised, a row that outgrew its cache must not look like an answer."""
    cache = init_cache(nnx.merge(*split).config, batch_size=3, max_length=16, dtype="float32")
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (3, 16))
    out = run(*split, tokens[:, :16], positions, cache)
    step = run(*split, tokens[:, 16:17], np.array([[16], [15], [16]], np.int32), out.cache)
    nan = np.isnan(np.asarray(step.logits)).all(axis=(1, 2))
    assert nan.tolist() == [True, False, True]


def test_padding_may_reach_beyond_the_cache(split, tokens, full_logits):
    """A prefill rounded up in length fits as long as its tokens do."""
    cache = init_cache(nnx.merge(*split).config, batch_size=3, max_length=16, dtype="float32")
    positions = np.where(np.arange(24) < 10, np.arange(24), -1)[None].repeat(3, axis=0)
    out = run(*split, tokens[:, :24], positions.astype(np.int32), cache)
    np.testing.assert_allclose(out.logits[:, 9], full_logits[:, 9], atol=2e-5)
    step = np.full((3, 1), 10, np.int32)
    out = run(*split, tokens[:, 10:11], step, out.cache)
    np.testing.assert_allclose(out.logits[:, 0], full_logits[:, 10], atol=2e-5)


def test_packed_documents_do_not_see_each_other(split, tokens, full_logits):
    """Two documents in one row: the second's logits equal those of the document alone."""
    model = nnx.merge(*split)
    both = np.concatenate([tokens[1:2, :25], tokens[:1, :15]], axis=1)
    segments = np.repeat([[1, 2]], [25, 15], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(25), np.arange(15)])[None].astype(np.int32)
    out = model(jnp.asarray(both), jnp.asarray(positions), jnp.asarray(segments))
    np.testing.assert_allclose(out.logits[0, 25:], full_logits[0, :15], atol=2e-5)


@pytest.mark.parametrize("name", [s for s in SIZES if s.endswith("_mini")])
def test_logits_depend_on_no_later_token(name):
    """Causality by gradient, in every miniature: position t hears nothing from after t."""
    config = model_config(name)
    graphdef, params = nnx.split(Gemma4(config, rngs=nnx.Rngs(1)))
    tokens = jnp.arange(3, 3 + 12)[None] % config.vocab_size

    def score(shift):
        model = nnx.merge(graphdef, params)
        x, context = model.embed(tokens)
        x = x + shift
        for layer in model.layers:
            x = layer(x, context)
        return jnp.sum(model.head(x)[0, 5])

    gradient = jax.jit(jax.grad(score))(jnp.zeros((1, 12, config.embed_dim)))
    size = np.abs(np.asarray(gradient[0])).sum(axis=-1)
    assert (size[:6] > 0).all() and (size[6:] == 0).all()


def test_attention_equals_its_plain_definition():
    key = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(key[0], (2, 20, 4, 16))
    k, v = (jax.random.normal(key[i], (2, 24, 2, 16)) for i in (1, 2))
    mask = jax.random.bernoulli(key[3], 0.5, (2, 20, 24)).at[:, :, 0].set(True)
    np.testing.assert_allclose(attend(q, k, v, mask), attend_plainly(q, k, v, mask), atol=2e-6)


def test_miniatures_keep_every_feature_of_their_size():
    for name in SIZES:
        if name.endswith("_mini"):
            mini, full = model_config(name), model_config(name.removesuffix("_mini"))
            for feature in ("attention_k_eq_v", "use_double_wide_mlp"):
                assert getattr(mini, feature) == getattr(full, feature), (name, feature)
            for feature in ("per_layer_dim", "num_experts", "num_kv_shared_layers"):
                assert bool(getattr(mini, feature)) == bool(getattr(full, feature)), (name, feature)
            assert mini.head_dim < mini.global_head_dim and mini.sliding_window < 128
            assert (mini.num_global_kv_heads == 1) or full.num_global_kv_heads > 1
            shared = mini.layer_types[mini.first_shared_layer :]
            assert not shared or {SLIDING, FULL} <= set(shared)
            period = mini.layer_types.index(FULL) + 1
            assert mini.num_layers >= 2 * period
            axes = {mini.embed_dim, mini.expert_dim, mini.per_layer_dim}
            axes |= {mini.layer_mlp_dim(i) for i in range(mini.num_layers)}
            axes |= {mini.num_heads * mini.layer_head_dim(i) for i in range(mini.num_layers)}
            assert all(axis % 64 == 0 for axis in axes), (name, axes)
