"""The mobile scheme (wNa8o8) of E2B and E4B as rules, and the same for their miniatures.

Weights of 2, 4 or 8 bits with one float32 scale per output channel, embedding tables with one per
row (the per-layer table: per row and layer), all of the two's-complement range. Static int8
activations at the input and output of every linear, int8 keys and values. The linear that feeds
the per-layer inputs stays float between quantized activations; the head takes float activations.

Source: the bit allocation of the released conversion script; keys' scales are calibrated, values'
are the constant 6/127 of the released files.
"""

import re
from collections.abc import Mapping, Sequence

from gemmaqat.quantization.rule import Rule

# Values leave a norm without a weight, so one bound serves every layer.
VALUE_SCALE = 6 / 127
CALIBRATION = "absmax"
SCALE_RULE = "mse"

_TABLE_RULE, _SHARED_RULE = "per-layer table", "shared mlp"
_TABLE = "embed_tokens_per_layer/weight"
_GATE = r"layers/(\d+)/mlp/gate_proj/weight"


def mobile_rules(
    *, shared_mlp: tuple[str, str] | None, table_qtype: str, per_layer_dim: int
) -> tuple[Rule, ...]:
    """The rules of one size, first match wins.

    Args:
        shared_mlp: a pattern of the layers that share their keys, and the type of the weights of
            their wider MLPs; None where they fare like the others.
        table_qtype: of the per-layer embedding table.
        per_layer_dim: its width per layer, the block of its scales.
    """

    def linear(name: str, module_path: str, qtype: str | None) -> Rule:
        return Rule(
            name=name,
            module_path=module_path,
            weight_qtype=qtype,
            scale_rule=SCALE_RULE if qtype else None,
            act_qtype="int8",
            output_qtype="int8",
            act_static_scale=True,
            act_calibration_method=CALIBRATION,
        )

    rules = [
        linear("attention", r"layers/\d+/self_attn/[qkvo]_proj", "int4"),
        Rule(
            name="keys and values",
            module_path=r"layers/\d+/self_attn",
            kv_qtype="int8",
            act_static_scale=True,
            act_calibration_method=CALIBRATION,
            value_scale=VALUE_SCALE,
        ),
        linear("mlp", r"layers/\d+/mlp/(gate|up|down)_proj", "int4"),
        linear("per-layer linears", r"layers/\d+/per_layer_(input_gate|projection)", "int8"),
        linear("per-layer model projection", r"per_layer_model_projection", None),
        Rule(
            name=_TABLE_RULE,
            module_path=r"embed_tokens_per_layer",
            weight_qtype=table_qtype,
            tile_size=per_layer_dim,
            scale_rule=SCALE_RULE,
        ),
        Rule(
            name="token table",
            module_path=r"embed_tokens",
            weight_qtype="int2",
            scale_rule=SCALE_RULE,
        ),
    ]
    if shared_mlp:
        layers, qtype = shared_mlp
        rules.insert(0, linear(_SHARED_RULE, rf"layers/({layers})/mlp/(gate|up|down)_proj", qtype))
    return tuple(rules)


MOBILE: dict[str, tuple[Rule, ...]] = {
    "mobile_e2b": mobile_rules(
        shared_mlp=(r"1[5-9]|2\d|3[0-4]", "int2"), table_qtype="int4", per_layer_dim=256
    ),
    "mobile_e4b": mobile_rules(shared_mlp=None, table_qtype="int2", per_layer_dim=256),
    "mobile_e2b_mini": mobile_rules(
        shared_mlp=(r"[23]", "int2"), table_qtype="int4", per_layer_dim=64
    ),
    "mobile_e4b_mini": mobile_rules(shared_mlp=None, table_qtype="int2", per_layer_dim=64),
}


def check_size(recipe: str, shapes: Mapping[str, tuple[int, ...]], own: Sequence[Rule]) -> None:
    """Refuses a model of another size, to which the patterns would give other bits unnoticed.

    Args:
        recipe: one of `MOBILE`.
        shapes: of every parameter, by path.
        own: the rules tried before the recipe's; what they match is not the recipe's affair.

    Raises:
        ValueError: the per-layer table is not as wide as the recipe's blocks, or the layers with
            wider MLPs are not those of the recipe.
    """
    theirs = {
        path for path in shapes
        if any(re.fullmatch(rule.module_path, path.rpartition("/")[0]) for rule in own)
    }  # fmt: skip
    misfit = _misfit(recipe, shapes, theirs)
    if misfit:
        fitting = [repr(name) for name in MOBILE if not _misfit(name, shapes, theirs)]
        way_out = f"use {' or '.join(fitting)}" if fitting else "use a recipe for all sizes"
        raise ValueError(
            f"recipe {recipe!r} is of another size: {misfit}; {way_out}, or decide these "
            "parameters in quantization.rules."
        )


def _misfit(recipe: str, shapes: Mapping[str, tuple[int, ...]], theirs: set[str]) -> str:
    """What of a model, `theirs` aside, a recipe was not written for; "" if nothing."""
    rules = {rule.name: rule for rule in MOBILE[recipe]}
    gates = {int(m[1]): path for path in shapes if (m := re.fullmatch(_GATE, path))}
    block = rules[_TABLE_RULE].tile_size
    found = shapes.get(_TABLE, (0,))[-1] // max(len(gates), 1)
    if found != block and _TABLE not in theirs:
        return f"its per-layer table has {block} values per layer, that of this model {found}"
    narrowest = min((shapes[path][-1] for path in gates.values()), default=0)
    judged = {layer: path for layer, path in gates.items() if path not in theirs}
    wide = {layer for layer, path in judged.items() if shapes[path][-1] > narrowest}
    expected = {
        layer for layer, path in judged.items()
        if _SHARED_RULE in rules
        and re.fullmatch(rules[_SHARED_RULE].module_path, path.rpartition("/")[0])
    }  # fmt: skip
    if wide != expected:
        return f"its wider MLPs are in {_span(expected)}, those of this model in {_span(wide)}"
    return ""


def _span(layers: set[int]) -> str:
    return f"layers {min(layers)} to {max(layers)}" if layers else "no layer"
