"""Attention of Gemma 4: query/key/value norms, rotary embedding, shared and equal keys."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gemmaqat.models.cache import KeyValues, attention_mask, extend
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.layers import HookPoint, Linear, RMSNorm, rms_normalise
from gemmaqat.typing import Activations, AttentionMask, Leaf, Positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What one layer's attention needs beside its input."""

    positions: Leaf  # int32 [B, T]
    segment_ids: Leaf | None  # int32 [B, T]
    rope: tuple[Leaf, Leaf]  # cosine and sine of this layer's type, float32 [B, T, H / 2]
    shared: KeyValues | None  # keys of the owner, for a layer that owns none
    cache: KeyValues | None  # this layer's slots, for a cached call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput:
    """The attention branch's result and the keys that later layers and calls read."""

    x: Leaf  # float [B, T, D]
    keys: KeyValues
    cache: KeyValues | None


class Attention(nnx.Module):
    """Grouped-query attention without a score scale (queries and keys are normed instead)."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs | None):
        head_dim, kv_heads = config.layer_head_dim(layer), config.layer_kv_heads(layer)
        self.head_dim = head_dim
        self.eps = config.rms_norm_eps
        self.window = config.sliding_window if config.is_sliding(layer) else None
        self.owns_kv = config.owns_kv(layer)
        self.keys_are_values = config.keys_are_values(layer)
        linear: dict[str, Any] = dict(dtype=config.param_dtype, rngs=rngs)
        # Fresh norms of h^(-1/4) on both sides make fresh scores q.k / sqrt(h).
        norm: dict[str, Any] = dict(
            eps=config.rms_norm_eps, dtype=config.param_dtype, rngs=rngs, value=head_dim**-0.25
        )
        width, kv_width = config.num_heads * head_dim, kv_heads * head_dim
        self.input = HookPoint(feeds=("q_proj", "k_proj", "v_proj"))
        self.q_proj = Linear(config.embed_dim, width, axes=("embed", "heads"), **linear)
        self.q_norm = RMSNorm(head_dim, **norm)
        if self.owns_kv:
            self.k_proj = Linear(config.embed_dim, kv_width, axes=("embed", "kv_heads"), **linear)
            if not self.keys_are_values:
                self.v_proj = Linear(
                    config.embed_dim, kv_width, axes=("embed", "kv_heads"), **linear
                )
            self.k_norm = RMSNorm(head_dim, **norm)
            self.k = HookPoint()
            self.v = HookPoint()
        self.o_proj = Linear(width, config.embed_dim, axes=("heads", "embed"), **linear)

    def __call__(self, x: Activations, around: Surroundings) -> AttentionOutput:
        """Attends; a layer that owns no keys reads `around.shared`."""
        x = self.input(x)
        q_BTNH = apply_rope(self.q_norm(self._split_heads(self.q_proj(x))), *around.rope)
        cache = around.cache
        if self.owns_kv:
            keys = self._keys(x, around)
            if cache is not None:
                keys, cache = extend(cache, keys, window=self.window)
        else:
            assert around.shared is not None
            keys = around.shared
        mask = attention_mask(
            around.positions, keys, segment_ids=around.segment_ids, window=self.window
        )
        y_BTNH = attend(q_BTNH, keys.k.astype(x.dtype), keys.v.astype(x.dtype), mask)
        y = self.o_proj(y_BTNH.reshape(*x.shape[:-1], -1))
        return AttentionOutput(y, keys, cache)

    def _keys(self, x: Activations, around: Surroundings) -> KeyValues:
        raw_k = self._split_heads(self.k_proj(x))
        raw_v = raw_k if self.keys_are_values else self._split_heads(self.v_proj(x))
        return KeyValues(
            k=self.k(apply_rope(self.k_norm(raw_k), *around.rope)),
            v=self.v(rms_normalise(raw_v, eps=self.eps)),
            positions=around.positions,
            segment_ids=around.segment_ids,
        )

    def _split_heads(self, x: Float[Array, "B T X"]) -> Float[Array, "B T Y H"]:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: AttentionMask,
) -> Float[Array, "B T N H"]:
    """Softmax attention with unscaled scores; query head n reads key head n // (N / K)."""
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask[:, None, :, :], scale=1.0)


def attend_plainly(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: AttentionMask,
) -> Float[Array, "B T N H"]:
    """The definition of `attend`, term by term in float32: the reference it is tested against."""
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, groups, axis=2) for x in (k_BSKH, v_BSKH))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSNH.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSNH)


def rope_frequencies(config: ModelConfig, *, sliding: bool) -> Float[Array, " R"]:
    """Angle per position of each rotating pair of dimensions.

    Sliding layers rotate every pair. Full-attention layers ("proportional") rotate only the first
    `partial_rotary_factor` of the pairs, with exponents over the whole head; the rest get 0.
    """
    head_dim = config.head_dim if sliding else config.global_head_dim
    theta = config.local_rope_theta if sliding else config.global_rope_theta
    pairs = head_dim // 2
    rotating = pairs if sliding else int(config.partial_rotary_factor * head_dim // 2)
    index = jnp.arange(pairs, dtype=jnp.float32)
    frequencies = theta ** (-2.0 * index / head_dim)
    return jnp.where(index < rotating, frequencies, 0.0)


def rope_table(
    positions: Positions, frequencies: Float[Array, " R"]
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosine and sine of every angle, in float32."""
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T Y H"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"]
) -> Float[Array, "B T Y H"]:
    """Rotates dimension j with dimension j + H/2 ("half-split" pairing), in float32."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
