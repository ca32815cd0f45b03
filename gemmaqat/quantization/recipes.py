"""Named recipes: lists of rules for whole models.

Every recipe keeps the router in float (its top-k decisions are discrete) and, without the suffix
`_emb`, the token and per-layer embedding tables. Norms and scalars are no matrices and stay float
by themselves. The `mobile_*` recipes (see `mobile.py`) belong to one size each and refuse others.
"""

import difflib
from typing import Any

from gemmaqat.quantization.mobile import MOBILE
from gemmaqat.quantization.rule import Rule

_ROUTER = Rule(name="router", module_path=r"(.*/)?router(/.*)?")
_EMBEDDINGS = Rule(name="embeddings", module_path=r"(.*/)?embed[^/]*")

_ANCHORED: dict[str, Any] = dict(
    weight_qtype="int4", tile_size=32, scale_rule="ggml", scale_bits=5, anchor=True, bf16_safe=True
)

_GRIDS: dict[str, dict[str, Any]] = {
    "int8": dict(weight_qtype="int8", scale_rule="absmax"),
    "int4_channel": dict(weight_qtype="int4", scale_rule="absmax"),
    # Q4_0 with a code -8 in every block and scales of 5 bits: bfloat16 holds the values, and the
    # stock converter of llama.cpp finds these codes in them again.
    "q4_0": _ANCHORED | dict(scale_dtype="float16"),
    # Q4_0 without, the codes chosen for the stored scale.
    "q4_0_free": dict(weight_qtype="int4", tile_size=32, scale_rule="ggml", scale_dtype="float16"),
    # ggml's own quantizers, bit for bit.
    "q4_0_ggml": dict(
        weight_qtype="int4",
        tile_size=32,
        scale_rule="ggml",
        scale_dtype="float16",
        round_scale="after",
        rounding="up",
    ),
    "q8_0_ggml": dict(
        weight_qtype="int8",
        tile_size=32,
        scale_rule="absmax",
        scale_dtype="float16",
        round_scale="after",
        rounding="away",
    ),
    # GGUF's 8-bit block and 6-bit superblock, codes chosen for the stored scale.
    "q8_0": dict(weight_qtype="q8_0"),
    "q6_k": dict(weight_qtype="q6_k", indivisible="q8_0"),
    # compressed-tensors W4A16, group 32, anchored too, with scales in the checkpoint's bfloat16.
    "w4a16_g32": _ANCHORED | dict(scale_dtype="bfloat16"),
    # That library's own choice: absmax / 7.5.
    "w4a16_g32_free": dict(
        weight_qtype="int4", tile_size=32, scale_rule="absmax_half", scale_dtype="bfloat16"
    ),
    "int3_channel": dict(weight_qtype="int3", scale_rule="absmax"),
    # The deployed 2-bit grid, codes -2..1.
    "int2_channel": dict(weight_qtype="int2", scale_rule="mean_abs", scale_factor=1.4),
    "int2_mid_channel": dict(
        weight_qtype="int2", levels="half", scale_rule="mean_abs", scale_factor=1.25
    ),
    "int2_block32": dict(
        weight_qtype="int2", tile_size=32, scale_rule="ggml", scale_dtype="float16"
    ),
    "ternary": dict(weight_qtype="ternary", scale_rule="mean_abs", scale_factor=1.53),
}


# compressed-tensors W8A8: the grids of `int8`, and each token's input to a linear rounded to 8
# bits. Not that of experts, which files hold as floats: no reader rounds their inputs.
_EXPERTS = Rule(name="experts", module_path=r"(.*/)?experts(/.*)?", **_GRIDS["int8"])
_W8A8 = Rule(name="w8a8", act_qtype="int8", **_GRIDS["int8"])


def _rules(name: str, grid: dict[str, Any], *, embeddings: bool) -> tuple[Rule, ...]:
    kept = (_ROUTER,) if embeddings else (_ROUTER, _EMBEDDINGS)
    return (*kept, Rule(name=name, **grid))


RECIPES: dict[str, tuple[Rule, ...]] = (
    {"none": (Rule(name="float"),)}
    | {name: _rules(name, grid, embeddings=False) for name, grid in _GRIDS.items()}
    | {f"{name}_emb": _rules(f"{name}_emb", grid, embeddings=True) for name, grid in _GRIDS.items()}
    | {"w8a8": (_ROUTER, _EMBEDDINGS, _EXPERTS, _W8A8), "w8a8_emb": (_ROUTER, _EXPERTS, _W8A8)}
    | MOBILE
)


def recipe(name: str) -> tuple[Rule, ...]:
    """The rules of a recipe.

    Raises:
        ValueError: no such recipe; the message names the nearest one and lists all.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"recipe {name!r} is unknown; {hint}Known: {', '.join(RECIPES)}.")
    return RECIPES[name]
