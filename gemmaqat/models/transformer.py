"""The Gemma 4 text decoder."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gemmaqat.models.attention import rope_frequencies, rope_table
from gemmaqat.models.block import Block, Context
from gemmaqat.models.cache import KVCache, init_cache
from gemmaqat.models.config import FULL, SLIDING, ModelConfig
from gemmaqat.models.embedding import Embed
from gemmaqat.models.kv_codes import KV_QUANTIZATIONS
from gemmaqat.models.layers import Linear, RMSNorm
from gemmaqat.typing import Activations, Leaf, Positions, SegmentIds, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a pass returns."""

    logits: Leaf | None  # float32 [B, T, V]; T = 1 for logits="last"; None for "none"
    hidden: Leaf  # float [B, T, D]: the stream after the last block, before the final norm
    cache: KVCache | None  # updated, where one was given


class Gemma4(nnx.Module):
    """Any of the five text decoders; `__call__` is `embed`, then each layer, then `head`.

    x, context = model.embed(tokens)
    for layer in model.layers:
        x = layer(x, context)
    logits = model.head(x)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None):
        """Builds the model.

        Args:
            config: see `model_config` for the named sizes.
            rngs: seeds; None builds an abstract model of shapes without storage.
        """
        self.config = config
        norm: dict[str, Any] = dict(eps=config.rms_norm_eps, dtype=config.param_dtype, rngs=rngs)
        self.embed_tokens = Embed(
            config.vocab_size,
            config.embed_dim,
            stddev=config.embed_dim**-0.5,
            gather_only=False,
            dtype=config.param_dtype,
            rngs=rngs,
        )
        if config.per_layer_dim:
            width = config.num_layers * config.per_layer_dim
            self.embed_tokens_per_layer = Embed(
                config.vocab_size,
                width,
                stddev=config.per_layer_dim**-0.5,
                gather_only=True,
                dtype=config.param_dtype,
                rngs=rngs,
            )
            self.per_layer_model_projection = Linear(
                config.embed_dim, width, axes=("embed", None), dtype=config.param_dtype, rngs=rngs
            )
            self.per_layer_projection_norm = RMSNorm(config.per_layer_dim, **norm)
        self.layers = nnx.List(
            [Block(config, index, rngs=rngs) for index in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.embed_dim, **norm)

    def __call__(
        self,
        tokens: Tokens,
        positions: Positions | None = None,
        segment_ids: SegmentIds | None = None,
        *,
        cache: KVCache | None = None,
        logits: Literal["all", "last", "none"] = "all",
    ) -> Output:
        """One pass over a batch of token sequences.

        Args:
            tokens: ids below the vocabulary's size.
            positions: absolute, 0-based, increasing; -1 marks padding anywhere in a row. Default:
                0, 1, 2, ... in every row; to be given with a cache.
            segment_ids: attention stays inside equal ids (packed documents, without a cache).
            cache: keys and values of earlier tokens; the result carries the extended one.
            logits: of all positions, of the last valid one in each row, or none (then use `head`
                on chunks of `hidden`).

        Raises:
            ValueError: a cache without positions or with segment ids; a position beyond the cache
                (where positions are traced, logits from there on are NaN instead).
        """
        x, context = self.embed(tokens, positions, segment_ids, cache=cache)
        for layer in self.layers:
            x = layer(x, context)
        scores = None
        if logits == "all":
            scores = self.head(x)
        elif logits == "last":
            valid = context.positions >= 0
            last = x.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
            scores = self.head(jnp.take_along_axis(x, last[:, None, None], axis=1))
        new_cache = None if context.cache is None else KVCache(tuple(context.cache))
        return Output(scores, x, new_cache)

    def embed(
        self,
        tokens: Tokens,
        positions: Positions | None = None,
        segment_ids: SegmentIds | None = None,
        *,
        cache: KVCache | None = None,
    ) -> tuple[Activations, Context]:
        """The input stream of the first layer and the context that all layers share."""
        if cache is not None and segment_ids is not None:
            raise ValueError(
                "segment_ids and cache were both given; a cached row is one document, drop one."
            )
        if cache is not None:
            _check_positions(positions, cache)
        if positions is None:
            positions = jnp.broadcast_to(
                jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape
            )
        config = self.config
        x = self.embed_tokens(tokens, scale=config.embed_dim**0.5, dtype=config.dtype)
        if cache is not None:
            x = jnp.where((positions < cache.max_length)[:, :, None], x, jnp.nan)
        rope: dict[str, Any] = {
            kind: rope_table(positions, rope_frequencies(config, sliding=kind == SLIDING))
            for kind in (SLIDING, FULL)
        }
        per_layer_inputs = self._per_layer_inputs(tokens, x) if config.per_layer_dim else None
        layers = None if cache is None else list(cache.layers)
        return x, Context(positions, segment_ids, rope, per_layer_inputs, layers, {})

    def head(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Final norm, tied head and soft cap: float32 logits of any positions of `hidden`."""
        logits = self.embed_tokens.attend(self.norm(x)).astype(jnp.float32)
        cap = self.config.final_logit_softcap
        return cap * jnp.tanh(logits / cap) if cap < float("inf") else logits

    def init_cache(
        self,
        *,
        batch_size: int,
        max_length: int,
        dtype: str | None = None,
        quantization: str | None = None,
    ) -> KVCache:
        """An empty key/value cache.

        Args:
            batch_size: sequences.
            max_length: positions of each.
            dtype: of stored floats; None = that of the computation.
            quantization: "static" stores int8 codes under the model's calibrated scales; "int8"
                and "int4" codes with a scale per token and head; None floats.

        Raises:
            ValueError: "static" on a model without such scales, a name that is none of these, or a
                dtype for codes.
        """
        if quantization is not None and quantization not in KV_QUANTIZATIONS:
            raise ValueError(
                f"quantization={quantization!r} is none of {', '.join(KV_QUANTIZATIONS)}; choose "
                "one, or None for a cache of floats."
            )
        if quantization is not None and dtype is not None:
            raise ValueError(
                f"dtype={dtype!r} and quantization={quantization!r} were both given; a cache holds "
                "floats or codes, drop one."
            )
        static = quantization == "static"
        return init_cache(
            self.config,
            batch_size=batch_size,
            max_length=max_length,
            dtype=dtype or self.config.dtype,
            quantization=quantization,
            static_scales=[self._static_scales(block) for block in self.layers] if static else (),
        )

    def _static_scales(self, block: Block) -> tuple[Array, Array] | None:
        """The calibrated scales of a layer's keys and values, where it owns any."""
        if not block.self_attn.owns_kv:
            return None
        k, v = _static_scale(block, "k"), _static_scale(block, "v")
        # The hooks round in the activations' dtype, to which they cast their scale first.
        return k.astype(self.config.dtype), v.astype(self.config.dtype)

    def _per_layer_inputs(self, tokens: Tokens, x: Activations) -> Float[Array, "B T L P"]:
        """Each layer's own embedding: a token part and a normed part from the input stream."""
        config = self.config
        shape = (*tokens.shape, config.num_layers, config.per_layer_dim)
        known = (tokens >= 0) & (tokens < config.vocab_size)
        token_part = self.embed_tokens_per_layer(
            jnp.where(known, tokens, 0), scale=config.per_layer_dim**0.5, dtype=config.dtype
        ).reshape(shape)
        projected = self.per_layer_model_projection(x) * config.embed_dim**-0.5
        context_part = self.per_layer_projection_norm(projected.reshape(shape))
        return (token_part + context_part) * 2.0**-0.5


def _static_scale(block: Block, name: Literal["k", "v"]) -> Array:
    variable = getattr(getattr(block.self_attn, name), "scale", None)
    scale = None if variable is None else variable.get_value()
    if isinstance(scale, jax.core.Tracer):  # where no error can be raised, nothing is readable
        return jnp.where(scale > 0, scale, jnp.nan)
    if scale is None or not scale > 0:
        found = "no scale" if scale is None else f"the scale {float(scale):g}"
        raise ValueError(
            f"layers/{block.index}/self_attn/{name} has {found}, a static cache needs one above 0; "
            "calibrate the model for a recipe with a static KV cache, or choose 'int8'."
        )
    return scale


def _check_positions(positions: Positions | None, cache: KVCache) -> None:
    """Refuses what a cached pass cannot mean, as far as it can be seen before tracing."""
    if positions is None:
        raise ValueError(
            "a cache was given without positions; pass those of `tokens`, counted from the start "
            "of the sequence."
        )
    if isinstance(positions, jax.core.Tracer):
        return
    last = int(jnp.max(positions))
    if last >= cache.max_length:
        raise ValueError(
            f"position {last} lies beyond the cache of {cache.max_length} positions; "
            "make the cache with a larger max_length."
        )
