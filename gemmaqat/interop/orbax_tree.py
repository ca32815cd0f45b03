"""The parameter tree of google-deepmind/gemma: its leaves, and ours inside them.

Theirs keeps heads apart, contracts over the second axis, and puts keys with values and gates with
ups into one array. A leaf is our tensor as files have it (`[..., out, in]`), reshaped, transposed,
and stacked with its siblings. The names of the 26B's two branches are crossed there: `mlp2` is the
dense one, `mlp` the experts.

Version 4.0.1 of that library feeds its router the experts' normed input, not the residual stream as
transformers does and we do: the same 26B weights give other logits there.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gemmaqat.models.config import FULL, ModelConfig


class Leaf(NamedTuple):
    """One array of their tree.

    Invariant: part i of the leaf is `tensor(paths[i]).reshape(split).transpose(order)`; several
    parts are stacked along a new first axis.
    """

    name: str  # in the tree of the module, e.g. `layer_3/attn/q_einsum/w`
    paths: tuple[str, ...]  # our parameters
    split: tuple[int, ...]
    order: tuple[int, ...]
    read: bool = True  # False: their module computes with it, but the result goes nowhere

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of one part."""
        return tuple(self.split[axis] for axis in self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the leaf."""
        return (len(self.paths), *self.part_shape) if len(self.paths) > 1 else self.part_shape

    def to_part(self, tensor: np.ndarray) -> np.ndarray:
        """Our tensor in their layout."""
        return tensor.reshape(self.split).transpose(self.order)

    def from_part(self, part: np.ndarray) -> np.ndarray:
        """Their part in ours, still split."""
        return part.transpose(np.argsort(self.order))


def leaves(config: ModelConfig) -> Iterator[Leaf]:
    """Every leaf of a text decoder, in the order of the tree."""
    yield Leaf(
        "embedder/input_embedding",
        ("embed_tokens/weight",),
        (config.vocab_size, config.embed_dim),
        (0, 1),
    )
    if config.per_layer_dim:
        layers, width, dim = config.num_layers, config.per_layer_dim, config.embed_dim
        yield Leaf(
            "embedder/per_layer_embeddings",
            ("embed_tokens_per_layer/weight",),
            (config.vocab_size, layers, width),
            (0, 1, 2),
        )
        yield Leaf(
            "embedder/per_layer_model_projection/w",
            ("per_layer_model_projection/weight",),
            (layers, width, dim),
            (2, 0, 1),
        )
        yield _vector(
            "embedder/per_layer_projection_norm/scale", "per_layer_projection_norm/weight", width
        )
    for layer in range(config.num_layers):
        yield from _block(config, layer)
    yield _vector("final_norm/scale", "norm/weight", config.embed_dim)


def period(config: ModelConfig) -> int:
    """Layers of one attention period: sliding ones and, last, a full one."""
    return config.layer_types.index(FULL) + 1


def stacked_name(name: str, period: int) -> tuple[str, int]:
    """The name of a leaf where periods are stacked, and its place there (-1 = not stacked)."""
    match = re.match(r"layer_(\d+)/(.*)", name)
    if not match:
        return name, -1
    place, kind = divmod(int(match[1]), period)
    return f"stacked_layers/attention_type_{kind}/{match[2]}", place


def canonical(name: str) -> str:
    """A leaf's name without the `/w` that feed-forward weights have in some trees."""
    return re.sub(r"(/mlp2?/(?:gating_einsum|linear))/w$", r"\1", name)


def _block(config: ModelConfig, layer: int) -> Iterator[Leaf]:
    ours, theirs, dim = f"layers/{layer}", f"layer_{layer}", config.embed_dim
    yield from _attention(config, layer)
    norms = {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    if config.num_experts:
        norms |= {
            "pre_ffw2_norm": "pre_feedforward_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm_2",
            "post_ffw2_norm": "post_feedforward_layernorm_1",
            "post_ffw1_norm": "post_feedforward_layernorm_2",
        }
    if config.per_layer_dim:
        norms["post_per_layer_input_norm"] = "post_per_layer_input_norm"
    for name, path in norms.items():
        yield _vector(f"{theirs}/{name}/scale", f"{ours}/{path}/weight", dim)
    yield _vector(f"{theirs}/skip_scale", f"{ours}/layer_scalar", 1)

    width, mlp = config.layer_mlp_dim(layer), "mlp2" if config.num_experts else "mlp"
    yield Leaf(
        f"{theirs}/{mlp}/gating_einsum",
        (f"{ours}/mlp/gate_proj/weight", f"{ours}/mlp/up_proj/weight"),
        (width, dim),
        (0, 1),
    )
    yield _transposed(f"{theirs}/{mlp}/linear", f"{ours}/mlp/down_proj/weight", width, dim)
    if config.per_layer_dim:
        p = config.per_layer_dim
        gate, projection = "per_layer_input_gate", "per_layer_projection"
        yield _transposed(f"{theirs}/{gate}/w", f"{ours}/{gate}/weight", dim, p)
        yield _transposed(f"{theirs}/{projection}/w", f"{ours}/{projection}/weight", p, dim)
    if config.num_experts:
        experts, width = config.num_experts, config.expert_dim
        yield _transposed(
            f"{theirs}/mlp/router_logits/w", f"{ours}/router/proj/weight", dim, experts
        )
        yield _vector(f"{theirs}/mlp/router_scale", f"{ours}/router/scale", dim)
        yield _vector(f"{theirs}/mlp/per_expert_scale", f"{ours}/router/per_expert_scale", experts)
        yield Leaf(
            f"{theirs}/mlp/gating_einsum",
            (f"{ours}/experts/gate_up_proj/weight",),
            (experts, 2, width, dim),
            (0, 1, 2, 3),
        )
        yield Leaf(
            f"{theirs}/mlp/linear",
            (f"{ours}/experts/down_proj/weight",),
            (experts, dim, width),
            (0, 2, 1),
        )


def _attention(config: ModelConfig, layer: int) -> Iterator[Leaf]:
    ours, theirs = f"layers/{layer}/self_attn", f"layer_{layer}/attn"
    dim, heads, kv = config.embed_dim, config.num_heads, config.layer_kv_heads(layer)
    head_dim, owns = config.layer_head_dim(layer), config.owns_kv(layer)
    yield Leaf(
        f"{theirs}/q_einsum/w", (f"{ours}/q_proj/weight",), (heads, head_dim, dim), (0, 2, 1)
    )
    pair = (f"{ours}/k_proj/weight", f"{ours}/v_proj/weight")
    raw = config.keys_are_values(layer)
    yield Leaf(
        f"{theirs}/{'k_einsum' if raw else 'kv_einsum'}/w",
        pair[:1] if raw else pair,
        (kv, head_dim, dim),
        (0, 2, 1),
        owns,
    )
    yield Leaf(
        f"{theirs}/attn_vec_einsum/w", (f"{ours}/o_proj/weight",), (dim, heads, head_dim), (1, 2, 0)
    )
    yield _vector(f"{theirs}/query_norm/scale", f"{ours}/q_norm/weight", head_dim)
    yield _vector(f"{theirs}/key_norm/scale", f"{ours}/k_norm/weight", head_dim)._replace(read=owns)


def _vector(name: str, path: str, length: int) -> Leaf:
    return Leaf(name, (path,), (length,), (0,))


def _transposed(name: str, path: str, into: int, out: int) -> Leaf:
    """Theirs is `[in, out]`."""
    return Leaf(name, (path,), (out, into), (1, 0))
