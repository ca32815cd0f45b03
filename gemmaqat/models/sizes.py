"""The five sizes of Gemma 4 and their miniatures: one table, one builder."""

import difflib
from typing import Any

from gemmaqat.models.config import FULL, SLIDING, LayerType, ModelConfig


def _pattern(period: int, num_layers: int) -> tuple[LayerType, ...]:
    """`period - 1` sliding layers and one full-attention layer, repeated."""
    return tuple(FULL if i % period == period - 1 else SLIDING for i in range(num_layers))


_FULL_SIZE: dict[str, Any] = dict(vocab_size=262_144, head_dim=256, global_head_dim=512)

# A miniature keeps every feature of its size; contraction axes are multiples of 64, the window
# (32) is shorter than the sequence (128) and the 128 entries hold the byte tokens of the tasks.
_MINIATURE: dict[str, Any] = dict(vocab_size=128, sliding_window=32, max_position=4_096)

_SIZES: dict[str, dict[str, Any]] = {
    "e2b": dict(
        **_FULL_SIZE,
        embed_dim=1536,
        mlp_dim=6144,
        num_heads=8,
        num_kv_heads=1,
        num_global_kv_heads=1,
        layer_types=_pattern(5, 35),
        sliding_window=512,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        per_layer_dim=256,
    ),
    "e4b": dict(
        **_FULL_SIZE,
        embed_dim=2560,
        mlp_dim=10_240,
        num_heads=8,
        num_kv_heads=2,
        num_global_kv_heads=2,
        layer_types=_pattern(6, 42),
        sliding_window=512,
        num_kv_shared_layers=18,
        per_layer_dim=256,
    ),
    "12b": dict(
        **_FULL_SIZE,
        embed_dim=3840,
        mlp_dim=15_360,
        num_heads=16,
        num_kv_heads=8,
        num_global_kv_heads=1,
        layer_types=_pattern(6, 48),
        sliding_window=1024,
        attention_k_eq_v=True,
        max_position=262_144,
    ),
    "26b_a4b": dict(
        **_FULL_SIZE,
        embed_dim=2816,
        mlp_dim=2112,
        num_heads=16,
        num_kv_heads=8,
        num_global_kv_heads=2,
        layer_types=_pattern(6, 30),
        sliding_window=1024,
        attention_k_eq_v=True,
        num_experts=128,
        num_experts_per_token=8,
        expert_dim=704,
        max_position=262_144,
    ),
    "31b": dict(
        **_FULL_SIZE,
        embed_dim=5376,
        mlp_dim=21_504,
        num_heads=32,
        num_kv_heads=16,
        num_global_kv_heads=4,
        layer_types=_pattern(6, 60),
        sliding_window=1024,
        attention_k_eq_v=True,
        max_position=262_144,
    ),
    "e2b_mini": dict(
        **_MINIATURE,
        embed_dim=64,
        mlp_dim=128,
        num_heads=2,
        num_kv_heads=1,
        num_global_kv_heads=1,
        head_dim=32,
        global_head_dim=64,
        layer_types=_pattern(2, 4),
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        per_layer_dim=64,
    ),
    "e4b_mini": dict(
        **_MINIATURE,
        embed_dim=64,
        mlp_dim=192,
        num_heads=4,
        num_kv_heads=2,
        num_global_kv_heads=2,
        head_dim=16,
        global_head_dim=32,
        layer_types=_pattern(3, 6),
        num_kv_shared_layers=3,
        per_layer_dim=64,
    ),
    "12b_mini": dict(
        **_MINIATURE,
        embed_dim=64,
        mlp_dim=256,
        num_heads=4,
        num_kv_heads=2,
        num_global_kv_heads=1,
        head_dim=16,
        global_head_dim=32,
        layer_types=_pattern(3, 6),
        attention_k_eq_v=True,
    ),
    "26b_a4b_mini": dict(
        **_MINIATURE,
        embed_dim=64,
        mlp_dim=128,
        num_heads=4,
        num_kv_heads=2,
        num_global_kv_heads=1,
        head_dim=16,
        global_head_dim=32,
        layer_types=_pattern(2, 4),
        attention_k_eq_v=True,
        num_experts=8,
        num_experts_per_token=2,
        expert_dim=64,
    ),
    "31b_mini": dict(
        **_MINIATURE,
        embed_dim=128,
        mlp_dim=256,
        num_heads=4,
        num_kv_heads=4,
        num_global_kv_heads=2,
        head_dim=32,
        global_head_dim=64,
        layer_types=_pattern(2, 4),
        attention_k_eq_v=True,
    ),
}

SIZES: tuple[str, ...] = tuple(_SIZES)
MINIATURES: tuple[str, ...] = tuple(name for name in _SIZES if name.endswith("_mini"))


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a named size.

    Args:
        name: one of `SIZES`, for example "e2b" or "26b_a4b_mini".
        **overrides: fields of `ModelConfig` to change.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
        TypeError: an override is no field of `ModelConfig`.
    """
    if name not in _SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"model size {name!r} is not one of {', '.join(SIZES)}{hint}")
    return ModelConfig(**{"name": name, **_SIZES[name], **overrides})
