"""A quantized cache gives what the full pass with the same quantizers as hooks gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.generation import generate
from gemmaqat.models.cache import KeyValues, extend
from gemmaqat.models.kv_codes import KV_QUANTIZATIONS, KVCodes, init_codes, quantize_like
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.activations import StaticQuantizer
from gemmaqat.quantization.calibration import calibrate
from gemmaqat.quantization.rules import resolve

WINDOW, LENGTH, BATCH = 8, 40, 3
K_SCALE, V_SCALE = 0.02, 6 / 127


class DynamicHook(nnx.Module):
    def __init__(self, quantization: str):
        self.quantization = quantization

    def __call__(self, x):
        like = init_codes((1, 1, 1, x.shape[-1]), self.quantization)
        return quantize_like(x, like).astype(x.dtype)


def make_model(quantization, **changes):
    """Two owning and two sharing layers; the hooks of one way of quantization."""
    model = Gemma4(model_config("e2b_mini", sliding_window=WINDOW, **changes), rngs=nnx.Rngs(0))
    for block in model.layers:
        if block.self_attn.owns_kv and quantization is not None:
            static = quantization == "static"
            for name, scale in (("k", K_SCALE), ("v", V_SCALE)):
                hook = StaticQuantizer(jnp.float32(scale)) if static else DynamicHook(quantization)
                setattr(block.self_attn, name, hook)
    return model


def storing_model(quantization, **changes):
    """The model whose cache is quantized: static scales live in it, dynamic ones need nothing."""
    return make_model("static" if quantization == "static" else None, **changes)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def run(graphdef, params, tokens, positions, cache=None):
    return nnx.merge(graphdef, params)(tokens, positions, cache=cache)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 128, (BATCH, LENGTH)).astype(np.int32)


POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))


@pytest.fixture(scope="module")
def float_logits(tokens):
    return np.asarray(run(*nnx.split(make_model(None)), tokens, POSITIONS).logits)


@pytest.fixture(scope="module", params=KV_QUANTIZATIONS)
def case(request, tokens):
    """Quantization, the storing model in parts, and the logits of the full pass with hooks."""
    full = run(*nnx.split(make_model(request.param)), tokens, POSITIONS)
    model = storing_model(request.param)
    return request.param, model, nnx.split(model), np.asarray(full.logits)


def chunked(case, tokens, lengths):
    quantization, model, split, _ = case
    cache = model.init_cache(batch_size=BATCH, max_length=LENGTH, quantization=quantization)
    logits, start = [], 0
    for length in lengths:
        at = slice(start, start + length)
        out = run(*split, tokens[:, at], POSITIONS[:, at], cache=cache)
        cache, start = out.cache, start + length
        logits.append(out.logits)
    return np.concatenate(logits, axis=1), cache


def assert_same_but_for_ties(found, wanted, moved):
    """Equal to float32 rounding.

    Sums of another order may tip a number over the middle between two codes; that would move a few
    logits by a small part of what quantization itself moves them.
    """
    difference = np.abs(found - wanted)
    assert np.quantile(difference, 0.9) < 2e-5, np.quantile(difference, 0.9)
    assert difference.max() < 0.1 * moved, (difference.max(), moved)


@pytest.mark.parametrize("lengths", [(4, 36), (13, 13, *[1] * 14)], ids=str)
def test_chunks_through_codes_equal_the_full_pass_with_hooks(case, tokens, float_logits, lengths):
    logits, _ = chunked(case, tokens, lengths)
    moved = np.abs(case[3] - float_logits).max()
    assert moved > 0.01  # quantization shows, so that equality says something
    assert_same_but_for_ties(logits, case[3], moved)


def test_one_chunk_through_codes_equals_the_full_pass_bit_for_bit(case, tokens):
    logits, _ = chunked(case, tokens, (LENGTH,))
    np.testing.assert_array_equal(logits, case[3])


def test_the_cache_holds_codes_and_no_float_beside_their_scales(case, tokens):
    quantization, _, split, _ = case
    _, cache = chunked(case, tokens, (4, 36))
    for layer in cache.layers:
        for stored in () if layer is None else (layer.k, layer.v):
            assert isinstance(stored, KVCodes)
            assert stored.codes.dtype == (jnp.uint8 if quantization == "int4" else jnp.int8)
            assert stored.codes.shape[1] == layer.positions.shape[1]
            assert stored.scales.ndim == (0 if quantization == "static" else 4)
    slots = [None if x is None else x.positions.shape[1] for x in cache.layers]
    assert slots == [WINDOW, LENGTH, None, None]


def test_stored_codes_are_those_of_the_hooks(tokens):
    """The full-attention owner's keys and values of a full pass, divided by their scales."""
    model = make_model("static")
    x, context = model.embed(jnp.asarray(tokens), jnp.asarray(POSITIONS))
    seen = {}
    for block in model.layers:
        x = block(x, context)
        if block.self_attn.owns_kv:
            seen[block.index] = context.shared[block.kind]
    cache = model.init_cache(batch_size=BATCH, max_length=LENGTH, quantization="static")
    out = model(jnp.asarray(tokens), jnp.asarray(POSITIONS), cache=cache)
    for index, keys in seen.items():
        slots = out.cache.layers[index]
        at = np.asarray(slots.positions)[0]
        for stored, value, scale in ((slots.k, keys.k, K_SCALE), (slots.v, keys.v, V_SCALE)):
            codes = np.rint(np.asarray(value, np.float64) / np.float32(scale))
            assert len(np.unique(codes)) > 50
            np.testing.assert_array_equal(stored.codes, codes[:, at])


def test_rows_of_different_lengths_decode_as_if_alone(case, tokens, float_logits):
    """Prompts of 5, 9 and 13 tokens, padded on the left, then 20 single steps around the ring."""
    quantization, model, split, wanted = case
    prompt, width = [5, 9, 13], 13
    ids = np.zeros((BATCH, width), np.int32)
    positions = np.full((BATCH, width), -1, np.int32)
    for row, length in enumerate(prompt):
        ids[row, width - length :] = tokens[row, :length]
        positions[row, width - length :] = np.arange(length)
    cache = model.init_cache(batch_size=BATCH, max_length=LENGTH, quantization=quantization)
    out = run(*split, ids, positions, cache=cache)
    rows, found, expected = np.arange(BATCH), [], []
    for step in range(20):
        at = np.array(prompt) + step
        out = run(*split, tokens[rows, at][:, None], at[:, None].astype(np.int32), cache=out.cache)
        found.append(out.logits[:, 0])
        expected.append(wanted[rows, at])
    moved = np.abs(wanted - float_logits).max()
    assert_same_but_for_ties(np.stack(found), np.stack(expected), moved)


@pytest.mark.parametrize("quantization", KV_QUANTIZATIONS)
@pytest.mark.parametrize("window", [WINDOW, None], ids=["sliding", "full"])
@pytest.mark.parametrize("seed", range(2))
def test_every_chunking_shows_the_same_codes_bit_for_bit(quantization, window, seed):
    """Random chunks with random padding: each visible position has just its own codes."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, BATCH, LENGTH, 2, 16)).astype(np.float32)
    slots = WINDOW if window else LENGTH
    k, v = (init_codes((BATCH, slots, 2, 16), quantization, static_scale=s) for s in (0.025, 0.04))
    cache = KeyValues(k, v, jnp.full((BATCH, slots), -1, jnp.int32))
    wanted = [quantize_like(jnp.asarray(x), like) for x, like in zip(values, (k, v), strict=True)]
    done = np.zeros(BATCH, int)
    while (done < LENGTH).any():
        # Each row takes its own number of tokens, at random places of the chunk.
        chunk = int(rng.choice([1, WINDOW - 1, 2 * WINDOW + 3]))
        positions = np.full((BATCH, chunk), -1, np.int32)
        new = rng.standard_normal((2, BATCH, chunk, 2, 16)).astype(np.float32)  # also in padding
        for row in range(BATCH):
            taken = min(int(rng.integers(0, chunk + 1)), LENGTH - done[row])
            at = np.sort(rng.choice(chunk, taken, replace=False))
            positions[row, at] = done[row] + np.arange(taken)
            new[:, row, at] = values[:, row, done[row] : done[row] + taken]
            done[row] += taken
        keys = KeyValues(jnp.asarray(new[0]), jnp.asarray(new[1]), jnp.asarray(positions))
        seen, cache = extend(cache, keys, window=window)
        for holder in (seen, cache):
            held = np.asarray(holder.positions)
            for stored, all_codes in zip((holder.k, holder.v), wanted, strict=True):
                shown = np.asarray(stored.astype(jnp.float32))
                exact = np.asarray(all_codes.astype(jnp.float32))
                for row in range(BATCH):
                    valid = held[row] >= 0
                    np.testing.assert_array_equal(shown[row, valid], exact[row, held[row, valid]])
        for row in range(BATCH):
            visible = set(range(max(0, done[row] - slots), done[row]))
            assert set(np.asarray(cache.positions)[row].tolist()) - {-1} == visible


def test_half_precision_reads_the_same_codes(tokens):
    model = make_model("static", dtype="bfloat16")
    full = run(*nnx.split(model), tokens, POSITIONS)
    cache = model.init_cache(batch_size=BATCH, max_length=LENGTH, quantization="static")
    out = run(*nnx.split(model), tokens, POSITIONS, cache=cache)
    np.testing.assert_array_equal(out.logits, full.logits)


def test_a_calibrated_mobile_model_generates_through_its_own_codes(tokens):
    """Recipe, calibration, static cache: the first pass is the prepared model's own, bit for bit,
    and the values' scale is the constant of the scheme.
    """
    model = make_model(None)
    table = resolve("mobile_e2b_mini", model)
    model = calibrate(model, table, [jnp.asarray(tokens)])
    full = run(*nnx.split(model), tokens, POSITIONS)
    cache = model.init_cache(batch_size=BATCH, max_length=LENGTH, quantization="static")
    assert float(cache.layers[1].v.scales) == np.float32(6 / 127)
    out = run(*nnx.split(model), tokens, POSITIONS, cache=cache)
    np.testing.assert_array_equal(out.logits, full.logits)
    prompts = tokens[:, :9].tolist()
    made = generate(model, prompts, max_new_tokens=4, stop_ids=(), kv_cache="static")
    first = np.argmax(np.asarray(full.logits)[:, 8], axis=-1)
    assert [ids[0] for ids in made.tokens] == first.tolist()


def test_bytes_shrink_by_as_much_as_the_codes_do(case):
    """Per token and head: H bytes, or H / 2, and 4 of a scale; static scales once per layer."""
    quantization, model, _, _ = case
    make = functools.partial(model.init_cache, batch_size=BATCH, max_length=LENGTH)
    plain, packed = make(), make(quantization=quantization)
    config, vectors, wanted = model.config, 0, 0
    for layer in (0, 1):
        slots = WINDOW if config.is_sliding(layer) else LENGTH
        vectors = 2 * BATCH * slots * config.layer_kv_heads(layer)
        head = config.layer_head_dim(layer)
        per_vector = {"static": head, "int8": head + 4, "int4": head // 2 + 4}[quantization]
        wanted += vectors * per_vector + (8 if quantization == "static" else 0)
    assert packed.kv_bytes == wanted < plain.kv_bytes / 3
    assert packed.position_bytes == plain.position_bytes


def test_a_static_cache_needs_calibrated_scales():
    model = make_model(None)
    make = functools.partial(model.init_cache, batch_size=1, max_length=8)
    with pytest.raises(ValueError, match="layers/0/self_attn/k has no scale.*calibrate"):
        make(quantization="static")
    model = make_model("static")
    model.layers[1].self_attn.v.scale.set_value(jnp.float32(0))
    make = functools.partial(model.init_cache, batch_size=1, max_length=8)
    with pytest.raises(ValueError, match="layers/1/self_attn/v has the scale 0.*calibrate"):
        make(quantization="static")
    make(quantization="int8")


def test_unknown_names_and_a_dtype_for_codes_are_refused():
    make = functools.partial(make_model(None).init_cache, batch_size=1, max_length=8)
    with pytest.raises(ValueError, match="quantization='int3' is none of static, int8, int4"):
        make(quantization="int3")
    with pytest.raises(ValueError, match="dtype='bfloat16' and quantization='int8'"):
        make(dtype="bfloat16", quantization="int8")


def test_scales_of_zero_show_where_no_error_can_be_raised(tokens):
    model = make_model("static")
    model.layers[0].self_attn.k.scale.set_value(jnp.float32(0))
    graphdef, params = nnx.split(model)

    @jax.jit
    def logits(params):
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(batch_size=BATCH, max_length=LENGTH, quantization="static")
        return model(jnp.asarray(tokens), jnp.asarray(POSITIONS), cache=cache).logits

    assert np.isnan(logits(params)).all()


def test_models_of_a_static_cache_keep_their_scales_when_it_is_donated(tokens):
    """The cache's scale is a copy: donating it must not take the parameter away."""
    model = make_model("static")
    for _ in range(2):
        cache = model.init_cache(batch_size=BATCH, max_length=LENGTH, quantization="static")
        run(*nnx.split(model), tokens, POSITIONS, cache=cache)
    assert float(model.layers[0].self_attn.k.scale.get_value()) == np.float32(K_SCALE)
