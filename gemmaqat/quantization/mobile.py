"""The mobile scheme (wNa8o8) of E2B and E4B as rules, and the same for their miniatures.

Weights of 2, 4 or 8 bits with one float32 scale per output channel, embedding tables with one per
row (the per-layer table: per row and layer), all of the two's-complement range. Static int8
activations at the input and output of every linear, int8 keys and values. The linear that feeds
the per-layer inputs stays float between quantized activations; the head takes float activations.

Source: the bit allocation of the released conversion script; keys' scales are calibrated, values'
are the constant 6/127 of the released files.
"""

from gemmaqat.quantization.rule import Rule

# Values leave a norm without a weight, so one bound serves every layer.
VALUE_SCALE = 6 / 127
CALIBRATION = "absmax"
SCALE_RULE = "mse"


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
            name="per-layer table",
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
        rules.insert(0, linear("shared mlp", rf"layers/({layers})/mlp/(gate|up|down)_proj", qtype))
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
