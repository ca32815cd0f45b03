"""Generation: golden continuations, lengths, sampling, streaming, stops and refusals."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat import generation
from gemmaqat.data.tokenizer import ByteTokenizer
from gemmaqat.generation import Sampling, TextStream, generate, sample
from gemmaqat.interop.hf import load_pretrained
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4

GOLDEN = Path(__file__).parent / "golden" / "gemma4"


@pytest.fixture(scope="module")
def model():
    """Two blocks, a vocabulary of bytes, a window shorter than the sequences."""
    config = model_config(
        "12b_mini",
        layer_types=("sliding_attention", "full_attention"),
        vocab_size=256,
        sliding_window=8,
        max_position=512,
    )
    model = Gemma4(config, rngs=nnx.Rngs(0))
    # A fresh model with a tied head repeats its last token; here the branches outweigh the stream,
    # so that what is said depends on what is seen and where.
    for block in model.layers:
        for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
            norm.weight.set_value(16 * norm.weight.get_value())
    return model


@nnx.jit
def forward(model, tokens, positions):
    return model(tokens, positions).logits


def greedy_by_full_passes(model, prompt: list[int], count: int) -> list[int]:
    """The slow way: no cache, one whole pass per token, padded on the right to a multiple of 64."""
    ids = list(prompt)
    width = -(-(len(ids) + count) // 64) * 64
    for _ in range(count):
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(ids)] = ids
        positions = np.where(np.arange(width) < len(ids), np.arange(width), -1).astype(np.int32)
        logits = forward(model, tokens, positions[None])
        ids.append(int(jnp.argmax(logits[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("case", ["e2b", "e4b", "12b", "26b", "31b"])
def test_greedy_continuation_is_the_golden_one(case):
    reference = np.load(GOLDEN / case / "reference.npz")
    result = generate(
        load_pretrained(GOLDEN / case),
        reference["input_ids"].tolist(),
        max_new_tokens=reference["greedy_ids"].shape[1],
        stop_ids=(),
    )
    assert result.tokens == reference["greedy_ids"].tolist()
    assert result.finish_reasons == ["length", "length"]


def test_prompts_of_different_lengths_continue_as_alone(model):
    prompts = [[5, 9, 200], list(range(40, 56))]
    together = generate(model, prompts, max_new_tokens=12, stop_ids=())
    assert together.prompt_lengths == [3, 16]
    assert all(len(set(tokens)) > 5 for tokens in together.tokens)
    for prompt, tokens in zip(prompts, together.tokens, strict=True):
        assert tokens == greedy_by_full_passes(model, prompt, 12)


def test_long_prompts_go_through_in_chunks(model, monkeypatch):
    prompts = [[int(i) for i in np.random.default_rng(0).integers(3, 256, n)] for n in (60, 5)]
    whole = generate(model, prompts, max_new_tokens=8, stop_ids=())
    monkeypatch.setattr(generation, "_PREFILL_CHUNK", 16)
    assert len(generation._prefill_chunks(prompts)) == 4
    assert generate(model, prompts, max_new_tokens=8, stop_ids=()).tokens == whole.tokens


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_keys_and_values_are_stored_as_codes_when_asked_for(model, monkeypatch, kv_cache):
    """A cache of eight-bit codes says what the float one says for a while; four bits differ."""
    prompts, made = [[5, 9, 200], list(range(40, 56))], []

    def init_cache(**settings):
        made.append(type(model).init_cache(model, **settings))
        return made[-1]

    plain = generate(model, prompts, max_new_tokens=12, stop_ids=())
    monkeypatch.setattr(model, "init_cache", init_cache, raising=False)
    coded = generate(model, prompts, max_new_tokens=12, stop_ids=(), kv_cache=kv_cache)
    assert [layer.k.codes.dtype for layer in made[0].layers] == [
        np.int8 if kv_cache == "int8" else np.uint8
    ] * 2
    if kv_cache == "int8":
        assert [row[:2] for row in coded.tokens] == [row[:2] for row in plain.tokens]
    else:
        assert coded.tokens != plain.tokens


def test_a_second_call_of_another_length_compiles_nothing(model):
    settings = dict(max_new_tokens=12, stop_ids=())
    generate(model, [[1, 2, 3], [4]], **settings)
    graphdef, _ = nnx.split(model)
    programs = generation._make_programs(graphdef, Sampling(True, 0, False))
    before = [p._cache_size() for p in (programs.prefill, programs.first, programs.loop)]
    generate(model, [[9] * 14, [4, 5]], max_new_tokens=5, stop_ids=())
    assert [p._cache_size() for p in (programs.prefill, programs.first, programs.loop)] == before


def test_stop_ids_end_a_prompt_unseen_and_alone(model):
    prompts = [[5, 9, 200], [7] * 16]
    free = generate(model, prompts, max_new_tokens=12, stop_ids=()).tokens
    stop = free[0][4]
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    for on_token in (None, lambda *event: None):
        result = generate(model, prompts, max_new_tokens=12, stop_ids=[stop], on_token=on_token)
        assert result.tokens == expected
        assert result.finish_reasons[0] == "stop"


def test_the_models_end_of_text_is_the_default_stop(model):
    prompts = [[5, 9, 200], [7]]
    first = generate(model, prompts, max_new_tokens=1, stop_ids=()).tokens[0][0]
    graphdef, state = nnx.split(model)
    ending = nnx.merge(graphdef, state)
    ending.config = model_config("12b_mini", **{
        field: getattr(model.config, field)
        for field in ("layer_types", "vocab_size", "sliding_window", "max_position")
    }, stop_ids=(255, first))  # fmt: skip
    assert generate(ending, prompts, max_new_tokens=4).tokens[0] == []


def test_streaming_gives_the_same_tokens_and_text(model):
    tokenizer = ByteTokenizer(256)
    prompts = ["once upon a tim", "x"]
    events = []
    for settings in (dict(), dict(temperature=1.0, top_k=50, top_p=0.9, seed=3)):
        settings |= dict(tokenizer=tokenizer, max_new_tokens=20, stop_ids=())
        silent = generate(model, prompts, **settings)
        events.clear()
        streamed = generate(model, prompts, **settings, on_token=lambda *e: events.append(e))
        assert streamed.tokens == silent.tokens
        assert streamed.texts == silent.texts
        for i in range(2):
            assert [e[1] for e in events if e[0] == i and e[1] >= 0] == silent.tokens[i]
            assert "".join(e[2] for e in events if e[0] == i) == silent.texts[i]


def test_text_prompts_begin_with_one_bos(model):
    tokenizer = ByteTokenizer(256)
    as_text = generate(model, ["abc", "d"], tokenizer=tokenizer, max_new_tokens=6, stop_ids=())
    as_ids = generate(model, [[2, 97, 98, 99], [2, 100]], max_new_tokens=6, stop_ids=())
    assert as_text.prompt_lengths == [4, 2]
    assert as_text.tokens == as_ids.tokens
    assert as_ids.texts == []


def test_the_seed_decides_what_is_drawn(model):
    def draw(seed):
        settings = dict(max_new_tokens=12, temperature=2.0, stop_ids=())
        return generate(model, [[5, 9, 200], [7]], seed=seed, **settings).tokens

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize(
    "settings, allowed",
    [
        (dict(top_k=3), {0, 1, 2}),
        (dict(top_k=1), {0}),
        (dict(top_p=0.7), {0, 1}),
        (dict(top_p=0.01), {0}),
        # Of the two best (0.625 and 0.375 once renormalised) the nucleus of 0.6 is the first.
        (dict(top_k=2, top_p=0.6), {0}),
        (dict(), {0, 1, 2, 3}),
    ],
    ids=str,
)
def test_sampling_draws_exactly_the_allowed_ids(settings, allowed):
    probabilities = jnp.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(probabilities)[None, :], (500, 4))
    top_p = settings.get("top_p", 1.0)
    ids = sample(
        logits,
        jax.random.key(0),
        sampling=Sampling(False, settings.get("top_k", 0), top_p < 1),
        temperature=jnp.float32(1.0),
        top_p=jnp.float32(top_p),
    )
    assert set(ids.tolist()) == allowed


def test_temperature_flattens_the_draw():
    logits = jnp.broadcast_to(jnp.array([2.0, 0.0])[None, :], (4000, 2))
    share = lambda t: np.mean(np.asarray(sample(  # noqa: E731
        logits, jax.random.key(0), sampling=Sampling(False, 0, False),
        temperature=jnp.float32(t), top_p=jnp.float32(1.0),
    )) == 0)  # fmt: skip
    for temperature in (0.5, 1.0, 4.0):
        expected = 1 / (1 + np.exp(-2.0 / temperature))
        # Four standard errors of 4000 draws.
        assert abs(share(temperature) - expected) < 4 * np.sqrt(0.25 / 4000)


def test_text_stream_never_cuts_a_character():
    text = "a é 漢字 🙂 b"
    stream = TextStream(ByteTokenizer(256))
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_text_stream_gives_up_a_broken_character_at_the_end():
    stream = TextStream(ByteTokenizer(256))
    pieces = [stream.push(byte) for byte in "né".encode()[:-1]]
    assert pieces == ["n", ""]
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize(
    "prompts, settings, error, message",
    [
        ([], {}, ValueError, "at least one prompt"),
        ("text", {}, ValueError, "expected a list"),
        (["text"], {}, TypeError, "need a tokenizer"),
        ([[5], []], {}, ValueError, r"prompts\[1\]: empty"),
        ([[5, 256]], {}, ValueError, r"prompts\[0\]: id 256 lies outside the vocabulary of 256"),
        ([[5, -1]], {}, ValueError, r"id -1 lies outside"),
        (
            [[5], [6] * 30],
            dict(cache_length=40, max_new_tokens=11),
            ValueError,
            r"prompts\[1\]: 30 tokens and max_new_tokens=11 make 41 positions, cache_length=40",
        ),
        ([[6] * 30], dict(max_new_tokens=500), ValueError, "max_position=512 holds fewer"),
        ([[5]], dict(temperature=-1.0), ValueError, "temperature=-1.0"),
        ([[5]], dict(top_k=-1), ValueError, "top_k=-1"),
        ([[5]], dict(top_p=0.0), ValueError, r"top_p=0\.0: expected above 0 and at most 1"),
        ([[5]], dict(max_new_tokens=0), ValueError, "max_new_tokens=0"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_before_it_runs(
    model, monkeypatch, prompts, settings, error, message
):
    monkeypatch.setattr(generation, "_make_programs", lambda *a: pytest.fail("ran"))
    with pytest.raises(error, match=message):
        generate(model, prompts, **settings)


def test_a_cache_of_just_the_needed_length_is_enough(model):
    prompts = [[6] * 16, [7]]
    exact = generate(model, prompts, max_new_tokens=10, cache_length=26, stop_ids=())
    assert exact.tokens == generate(model, prompts, max_new_tokens=10, stop_ids=()).tokens


@pytest.mark.parametrize(
    "length, cache_length, count", [(260, None, 8), (20, 24, 4)], ids=["chunked", "exact"]
)
def test_padding_may_reach_beyond_the_cache(model, length, cache_length, count):
    """260 tokens are padded to 512 for a cache of 384 positions, 20 to 32 for one of 24."""
    prompt = [int(i) for i in np.random.default_rng(1).integers(3, 256, length)]
    result = generate(model, [prompt], max_new_tokens=count, cache_length=cache_length, stop_ids=())
    assert result.tokens == [greedy_by_full_passes(model, prompt, count)]


def test_a_temperature_too_small_to_divide_by_is_greedy(model):
    prompts = [[5, 9, 200], list(range(40, 56))]
    greedy = generate(model, prompts, max_new_tokens=12, stop_ids=()).tokens
    assert generate(model, prompts, max_new_tokens=12, stop_ids=(), temperature=1e-39).tokens == (
        greedy
    )
