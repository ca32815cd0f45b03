"""Text generation: a jitted prefill, a jitted decode loop, and sampling.

Prompts of one batch may differ in length: they are padded on the left with position -1, which the
model neither attends to nor caches. Padded lengths come from a short list, so that a new prompt
length seldom means a new compilation.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gemmaqat.data.tokenizer import Tokenizer
from gemmaqat.models.config import ModelConfig

_PREFILL_CHUNK = 1024  # longest piece of a prompt that goes through the model at once
_SHORTEST_CHUNK = 16
_COLDEST = 1e-6  # temperatures below it are greedy
_CACHE_STEP = 128  # cache lengths are multiples of it

OnToken = Callable[[int, int, str], None]  # prompt number, token id, text that became complete


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated. Lists have one entry per prompt; a stop id ends a list unseen."""

    tokens: list[list[int]]
    texts: list[str]  # empty without a tokenizer
    finish_reasons: list[Literal["stop", "length"]]
    prompt_lengths: list[int]
    prefill_seconds: float  # compilation included
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all prompts per second of the decode loop (its compilation included)."""
        return sum(map(len, self.tokens)) / max(self.decode_seconds, 1e-9)


class Sampling(NamedTuple):
    """The part of the sampling settings that decides which program is compiled."""

    greedy: bool
    top_k: int  # 0 = all
    nucleus: bool  # whether top_p is below 1


def generate(
    model: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    cache_length: int | None = None,
    kv_cache: str | None = None,
    on_token: OnToken | None = None,
) -> Generation:
    """Continues every prompt of a batch.

    Args:
        model: a `Gemma4`, float or converted to packed weights.
        prompts: texts (with a tokenizer; they begin with exactly one <bos>) or lists of token ids.
        tokenizer: encodes text prompts and decodes what is generated.
        max_new_tokens: most tokens generated per prompt.
        temperature: divides the logits; 0, like anything below 1e-6, takes the most likely token.
        top_k: only the k most likely tokens are drawn from; 0 = all.
        top_p: only the smallest set of tokens with at least this probability; applied after top_k.
        seed: of the drawing; the same seed and batch give the same tokens.
        stop_ids: ids that end a prompt's continuation; None = the model's, and the end of text of
            the tokenizer where there is one.
        cache_length: positions the cache holds; None = as many as needed.
        kv_cache: how keys and values are stored: "static" (int8 under the model's calibrated
            scales), "int8" or "int4" (a scale per token and head); None = as floats.
        on_token: called as tokens appear with (prompt number, token id, text completed by it). The
            pieces of one prompt join to its text, and no piece ends within a character; what an
            ended prompt still holds back comes with id -1.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, a prompt with its continuation
            longer than the cache, a sampling setting out of range, or a static cache for a model
            without scales.
        TypeError: text prompts without a tokenizer.
    """
    config: ModelConfig = model.config
    ids = _encode(prompts, tokenizer)
    _check_sampling(temperature, top_k, top_p, max_new_tokens, config)
    length = _check_lengths(ids, max_new_tokens, cache_length, config)
    if stop_ids is None:
        stop_ids = [*config.stop_ids, *([] if tokenizer is None else [tokenizer.eos_id])]

    graphdef, params = nnx.split(model)
    # Below the resolution of the logits nothing else could be drawn, and the quotient overflows.
    greedy = temperature < _COLDEST
    sampling = Sampling(greedy, min(top_k, config.vocab_size), top_p < 1)
    programs = _make_programs(graphdef, sampling)
    settings = _Settings(
        temperature=jnp.float32(1.0 if greedy else temperature),
        top_p=jnp.float32(top_p),
        stop_ids=jnp.asarray([*stop_ids, -1], jnp.int32),
        key=jax.random.key(seed),
    )
    began = time.perf_counter()
    cache = model.init_cache(batch_size=len(ids), max_length=length, quantization=kv_cache)
    logits = None
    for tokens, positions, is_last in _prefill_chunks(ids):
        logits, cache = programs.prefill(params, tokens, positions, cache, is_last=is_last)
    lengths = np.array([len(prompt) for prompt in ids], np.int32)
    state = programs.first(logits, jnp.asarray(lengths), cache, settings)
    state.token.block_until_ready()
    prefilled = time.perf_counter()

    decode = _Decoded(len(ids), tokenizer, on_token)
    if on_token is None:
        # The buffer's length is part of the program: round it up, stop at the true limit.
        first = np.array(state.token)  # a copy: the state is donated to the loop
        size = _round_up(max_new_tokens, 64)
        rest, _ = programs.loop(params, state, settings, jnp.int32(max_new_tokens), size=size)
        decode.add(first)
        for row in np.asarray(rest).T[1:max_new_tokens]:
            decode.add(row)
    else:
        for step in range(1, max_new_tokens + 1):
            if not decode.add(np.asarray(state.token)) or step == max_new_tokens:
                break
            state = programs.step(params, state, settings, jnp.int32(step))
    decode.finish()
    return Generation(
        tokens=decode.tokens,
        texts=[tokenizer.decode(row) for row in decode.tokens] if tokenizer else [],
        finish_reasons=["stop" if stopped else "length" for stopped in decode.stopped],
        prompt_lengths=lengths.tolist(),
        prefill_seconds=prefilled - began,
        decode_seconds=time.perf_counter() - prefilled,
    )


def sample(
    logits: Float[Array, "B V"],
    key: PRNGKeyArray,
    *,
    sampling: Sampling,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " B"]:
    """Draws one id per row: temperature first, then top-k, then the nucleus."""
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if not sampling.top_k and not sampling.nucleus:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    values, ids = jax.lax.top_k(logits, sampling.top_k or logits.shape[-1])
    if sampling.nucleus:
        probabilities = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        values = jnp.where(before < top_p, values, -jnp.inf)  # the first is always kept
    choice = jax.random.categorical(key, values)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


class TextStream:
    """Turns a growing list of ids into pieces of text, cut between characters, that join to it.

    Only a short tail is decoded again for each token: from the start of the last emitted piece, so
    that tokenizers that treat the start of a text specially see what precedes.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # of the piece before the pending ids
        self._sent = 0  # ids whose text has been emitted

    def push(self, token: int) -> str:
        """Text that the token completed, perhaps none."""
        self._ids.append(token)
        return self._emit(final=False)

    def flush(self) -> str:
        """Text of what is left, an incomplete character included."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        known = self._tokenizer.decode(self._ids[self._start : self._sent])
        text = self._tokenizer.decode(self._ids[self._start :])
        # A replacement character at the end may be the first bytes of one that is still coming.
        if (text.endswith("\ufffd") and not final) or len(text) <= len(known):
            return ""
        self._start, self._sent = self._sent, len(self._ids)
        return text[len(known) :]


class _Settings(NamedTuple):
    """Sampling settings that may change without compiling again."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    stop_ids: Int[Array, " S"]  # padded with -1
    key: PRNGKeyArray


class _State(NamedTuple):
    """Between two steps. `token` is -1 where a prompt has ended; it stands at `position`."""

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    cache: Any


class _Programs(NamedTuple):
    prefill: Callable[..., Any]
    first: Callable[..., _State]
    step: Callable[..., _State]
    loop: Callable[..., tuple[Array, _State]]


@functools.lru_cache(maxsize=16)
def _make_programs(graphdef: Any, sampling: Sampling) -> _Programs:
    """The jitted programs of one model structure, kept so that a second call compiles nothing."""

    def choose(logits: Array, ended: Bool[Array, " B"], settings: _Settings, step: Any) -> Array:
        token = sample(
            logits,
            jax.random.fold_in(settings.key, step),
            sampling=sampling,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        return jnp.where(ended | jnp.isin(token, settings.stop_ids), -1, token)

    def prefill(params: Any, tokens: Array, positions: Array, cache: Any, *, is_last: bool) -> Any:
        model = nnx.merge(graphdef, params)
        out = model(tokens, positions, cache=cache, logits="last" if is_last else "none")
        return (out.logits[:, -1] if is_last else None), out.cache

    def first(logits: Array, lengths: Array, cache: Any, settings: _Settings) -> _State:
        ended = jnp.zeros(lengths.shape, bool)
        return _State(choose(logits, ended, settings, 0), lengths, cache)

    def step(params: Any, state: _State, settings: _Settings, number: Any) -> _State:
        model = nnx.merge(graphdef, params)
        ended = state.token < 0
        tokens = jnp.where(ended, 0, state.token)[:, None]
        positions = jnp.where(ended, -1, state.position)[:, None]
        out = model(tokens, positions, cache=state.cache, logits="last")
        token = choose(out.logits[:, -1], ended, settings, number)
        return _State(token, state.position + 1, out.cache)

    def loop(params: Any, state: _State, settings: _Settings, limit: Any, *, size: int) -> Any:
        """Ids of steps 1 to limit - 1 in columns of the same number, -1 elsewhere; last state."""

        def unfinished(carry: Any) -> Any:
            number, state, _ = carry
            return (number < limit) & jnp.any(state.token >= 0)

        def body(carry: Any) -> Any:
            number, state, tokens = carry
            state = step(params, state, settings, number)
            return number + 1, state, tokens.at[:, number].set(state.token)

        tokens = jnp.full((state.token.shape[0], size), -1, jnp.int32)
        _, state, tokens = jax.lax.while_loop(unfinished, body, (jnp.int32(1), state, tokens))
        return tokens, state  # returned so that its donated cache is updated in place

    return _Programs(
        prefill=jax.jit(prefill, static_argnames="is_last", donate_argnames="cache"),
        first=jax.jit(first, donate_argnames="cache"),
        step=jax.jit(step, donate_argnames="state"),
        loop=jax.jit(loop, static_argnames="size", donate_argnames="state"),
    )


class _Decoded:
    """Collects the ids of every prompt and reports them, with their text, as they appear."""

    def __init__(self, count: int, tokenizer: Tokenizer | None, on_token: OnToken | None):
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.stopped = [False] * count
        self._on_token = on_token
        self._streams = []
        if on_token is not None and tokenizer is not None:
            self._streams = [TextStream(tokenizer) for _ in range(count)]

    def add(self, row: np.ndarray) -> bool:
        """Takes one id per prompt (-1 = ended); returns whether any prompt goes on."""
        for i, token in enumerate(row.tolist()):
            if token < 0:
                self.stopped[i] = True
                continue
            self.tokens[i].append(token)
            if self._on_token:
                self._on_token(i, token, self._streams[i].push(token) if self._streams else "")
        return not all(self.stopped)

    def finish(self) -> None:
        """Emits what the streams still hold back."""
        for i, stream in enumerate(self._streams):
            if self._on_token and (text := stream.flush()):
                self._on_token(i, -1, text)


def _encode(prompts: Sequence[Any], tokenizer: Tokenizer | None) -> list[list[int]]:
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError("prompts: expected a list with at least one prompt, each a text or ids.")
    ids: list[list[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise TypeError(
                    "prompts: texts need a tokenizer; pass tokenizer=..., or lists of token ids."
                )
            prompt = list(tokenizer.encode(prompt, where=f"prompts[{len(ids)}]"))
            if prompt[:1] != [tokenizer.bos_id]:  # a chat template has written it already
                prompt.insert(0, tokenizer.bos_id)
        ids.append([int(token) for token in prompt])
    return ids


def _check_sampling(
    temperature: float, top_k: int, top_p: float, max_new_tokens: int, config: ModelConfig
) -> None:
    for name, value, valid, expected in (
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0, f"0 (all) to {config.vocab_size}"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
    ):
        if not valid:
            raise ValueError(f"{name}={value}: expected {expected}.")


def _check_lengths(
    ids: list[list[int]], max_new_tokens: int, cache_length: int | None, config: ModelConfig
) -> int:
    """The cache length to use, after refusing what cannot run."""
    for i, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"prompts[{i}]: empty; give at least one token (a <bos> will do).")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"prompts[{i}]: id {token} lies outside the vocabulary of {config.vocab_size}; "
                    "the tokenizer is not the model's."
                )
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    needed = len(ids[longest]) + max_new_tokens
    limit = cache_length or config.max_position
    if needed > limit:
        holder = "cache_length" if cache_length else "max_position"
        raise ValueError(
            f"prompts[{longest}]: {len(ids[longest])} tokens and max_new_tokens={max_new_tokens} "
            f"make {needed} positions, {holder}={limit} holds fewer; shorten the prompt, generate "
            f"less{', or raise cache_length' if cache_length else ''}."
        )
    return cache_length or min(_round_up(needed, _CACHE_STEP), config.max_position)


def _prefill_chunks(ids: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """Left-padded (tokens, positions, is_last): one chunk of a power of two, or several equal."""
    longest = max(map(len, ids))
    chunk = _SHORTEST_CHUNK
    while chunk < min(longest, _PREFILL_CHUNK):
        chunk *= 2
    width = _round_up(longest, chunk)
    tokens = np.zeros((len(ids), width), np.int32)
    positions = np.full((len(ids), width), -1, np.int32)
    for i, prompt in enumerate(ids):
        tokens[i, width - len(prompt) :] = prompt
        positions[i, width - len(prompt) :] = np.arange(len(prompt))
    starts = range(0, width, chunk)
    return [
        (tokens[:, s : s + chunk], positions[:, s : s + chunk], s + chunk == width) for s in starts
    ]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
