"""`ModelConfig`: one frozen description of a Gemma 4 text decoder, to and from Hugging Face's."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal

LayerType = Literal["sliding_attention", "full_attention"]
SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"

DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES = ("none", "full", "dots")

_FAMILIES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")


# The smallest value of each count: a width of 0 would divide by zero far from here.
_COUNTS = dict.fromkeys(
    (
        "vocab_size", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "num_global_kv_heads",
        "head_dim", "global_head_dim", "sliding_window", "max_position",
    ),
    1,
) | dict.fromkeys(
    ("num_kv_shared_layers", "per_layer_dim", "num_experts", "num_experts_per_token", "expert_dim"),
    0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Gemma 4 text decoder. Widths are counts of elements; letters are those of `typing.py`."""

    name: str
    vocab_size: int  # V
    embed_dim: int  # D
    mlp_dim: int  # F of the dense branch (doubled in shared layers if use_double_wide_mlp)
    num_heads: int  # N
    num_kv_heads: int  # K of sliding layers
    num_global_kv_heads: int  # K of full-attention layers
    head_dim: int  # H of sliding layers
    global_head_dim: int  # H of full-attention layers
    layer_types: tuple[LayerType, ...]  # one per layer; the last is full attention
    sliding_window: int  # W: a query sees itself and W - 1 earlier positions
    attention_k_eq_v: bool = False  # full-attention layers use the raw key projection as value
    num_kv_shared_layers: int = 0  # the last so many layers read the keys of an earlier layer
    use_double_wide_mlp: bool = False
    per_layer_dim: int = 0  # P; 0 = no per-layer embeddings
    num_experts: int = 0  # E; 0 = dense
    num_experts_per_token: int = 0
    expert_dim: int = 0  # F of one expert
    local_rope_theta: float = 10_000.0
    global_rope_theta: float = 1_000_000.0
    partial_rotary_factor: float = 0.25  # share of a full-attention head that rotates
    final_logit_softcap: float = 30.0
    rms_norm_eps: float = 1e-6
    max_position: int = 131_072
    pad_id: int = 0
    eos_id: int = 1
    bos_id: int = 2
    stop_ids: tuple[int, ...] = (1,)  # any of them ends a generated text
    dtype: str = "float32"  # of the computation
    param_dtype: str = "float32"  # of the parameters (the master copy in training)
    remat: str = "none"  # per block: none | full (save nothing) | dots (save matmul results)

    def __post_init__(self) -> None:
        where = f"model config {self.name!r}"
        for field, least in _COUNTS.items():
            count = getattr(self, field)
            if not isinstance(count, int) or not least <= count < 2**31:
                raise ValueError(f"{where}: {field}={count!r}, expected a number from {least} up.")
        for field in ("head_dim", "global_head_dim"):
            if getattr(self, field) % 2:
                raise ValueError(
                    f"{where}: {field}={getattr(self, field)} is odd; rotary embedding turns pairs."
                )
        if not self.layer_types or self.layer_types[-1] != FULL:
            raise ValueError(f"{where}: the last of layer_types must be {FULL!r}.")
        for kind in set(self.layer_types) - {SLIDING, FULL}:
            raise ValueError(f"{where}: layer type {kind!r} is not one of {SLIDING!r}, {FULL!r}.")
        for heads in (self.num_kv_heads, self.num_global_kv_heads):
            if heads < 1 or self.num_heads % heads:
                raise ValueError(
                    f"{where}: num_heads={self.num_heads} is not a multiple of {heads} kv heads."
                )
        if not self.attention_k_eq_v and self.num_global_kv_heads != self.num_kv_heads:
            raise ValueError(
                f"{where}: num_global_kv_heads={self.num_global_kv_heads} differs from "
                f"num_kv_heads={self.num_kv_heads}; only models with attention_k_eq_v have "
                "global layers of their own width."
            )
        if self.num_kv_shared_layers >= self.num_layers:
            raise ValueError(
                f"{where}: num_kv_shared_layers={self.num_kv_shared_layers} of {self.num_layers} "
                "layers; at least one owns keys."
            )
        if self.num_kv_shared_layers:
            owned = self.layer_types[: self.num_layers - self.num_kv_shared_layers]
            for kind in set(self.layer_types[len(owned) :]):
                if kind not in owned:
                    raise ValueError(
                        f"{where}: shared {kind} layers have no earlier layer to read."
                    )
        if self.num_experts and not 0 < self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"{where}: num_experts_per_token={self.num_experts_per_token} must lie in "
                f"1..{self.num_experts}."
            )
        for field, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("param_dtype", self.param_dtype, DTYPES),
            ("remat", self.remat, REMAT_POLICIES),
        ):
            if value not in known:
                near = difflib.get_close_matches(value, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise ValueError(f"{where}: {field}={value!r} is not one of {known}{hint}")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layer_types)

    @property
    def first_shared_layer(self) -> int:
        """Layers from here on own no keys or values (L when none shares)."""
        return self.num_layers - self.num_kv_shared_layers

    def owns_kv(self, layer: int) -> bool:
        """Whether the layer computes its own keys and values."""
        return layer < self.first_shared_layer

    def is_sliding(self, layer: int) -> bool:
        """Whether the layer attends within the sliding window only."""
        return self.layer_types[layer] == SLIDING

    def layer_head_dim(self, layer: int) -> int:
        """H of one layer."""
        return self.head_dim if self.is_sliding(layer) else self.global_head_dim

    def layer_kv_heads(self, layer: int) -> int:
        """K of one layer."""
        return self.num_kv_heads if self.is_sliding(layer) else self.num_global_kv_heads

    def layer_mlp_dim(self, layer: int) -> int:
        """F of one layer's dense branch."""
        wide = self.use_double_wide_mlp and not self.owns_kv(layer)
        return self.mlp_dim * (2 if wide else 1)

    def keys_are_values(self, layer: int) -> bool:
        """Whether the layer has no value projection and uses its raw keys."""
        return self.attention_k_eq_v and not self.is_sliding(layer)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token is multiplied with, the tied head included (for FLOPs)."""
        total = self.vocab_size * self.embed_dim
        if self.per_layer_dim:
            total += self.embed_dim * self.num_layers * self.per_layer_dim
        for i in range(self.num_layers):
            heads, kv = self.num_heads, self.layer_kv_heads(i)
            total += 2 * self.embed_dim * heads * self.layer_head_dim(i)
            if self.owns_kv(i):
                copies = 1 if self.keys_are_values(i) else 2
                total += copies * self.embed_dim * kv * self.layer_head_dim(i)
            total += 3 * self.embed_dim * self.layer_mlp_dim(i)
            total += 2 * self.embed_dim * self.per_layer_dim
            total += self.num_experts_per_token * 3 * self.embed_dim * self.expert_dim
            total += self.num_experts * self.embed_dim
        return total

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, name: str, where: str) -> "ModelConfig":
        """Reads a Hugging Face `config.json` mapping, nested or flat.

        Args:
            config: the parsed file.
            name: name to give the model.
            where: path named in errors.

        Raises:
            ValueError: the file is of another model family, or a field is missing.
        """
        text = config.get("text_config") or config
        if not isinstance(text, Mapping):
            raise ValueError(f"{where}: text_config is {text!r}, expected an object.")
        family = text.get("model_type", config.get("model_type"))
        if family not in _FAMILIES:
            raise ValueError(
                f"{where}: model_type is {family!r}, expected a Gemma 4 text decoder "
                f"({', '.join(_FAMILIES)}); point at a folder of google/gemma-4-*."
            )
        try:
            _check_constants(text, where)
            fields = _fields_from_hf(text, family)
            fields["stop_ids"] = _id_list(config.get("eos_token_id")) or (fields["eos_id"],)
            return cls(**fields, name=name)
        except KeyError as error:
            raise ValueError(
                f"{where}: field {error.args[0]!r} is missing from the text configuration; "
                "the file is incomplete, fetch it again."
            ) from None

    def to_hf(self) -> dict[str, Any]:
        """The flat Hugging Face text configuration (`gemma4_text`) of this model."""
        return {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": "gemma4_text",
            "vocab_size": self.vocab_size,
            "vocab_size_per_layer_input": self.vocab_size,
            "hidden_size": self.embed_dim,
            "intermediate_size": self.mlp_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "num_global_key_value_heads": (
                self.num_global_kv_heads if self.attention_k_eq_v else None
            ),
            "head_dim": self.head_dim,
            "global_head_dim": self.global_head_dim,
            "layer_types": list(self.layer_types),
            "sliding_window": self.sliding_window,
            "attention_k_eq_v": self.attention_k_eq_v,
            "num_kv_shared_layers": self.num_kv_shared_layers,
            "use_double_wide_mlp": self.use_double_wide_mlp,
            "hidden_size_per_layer_input": self.per_layer_dim,
            "enable_moe_block": self.num_experts > 0,
            "num_experts": self.num_experts or None,
            "top_k_experts": self.num_experts_per_token or None,
            "moe_intermediate_size": self.expert_dim or None,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "final_logit_softcapping": (
                None if math.isinf(self.final_logit_softcap) else self.final_logit_softcap
            ),
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position,
            "rope_parameters": {
                FULL: {
                    "rope_type": "proportional",
                    "partial_rotary_factor": self.partial_rotary_factor,
                    "rope_theta": self.global_rope_theta,
                },
                SLIDING: {"rope_type": "default", "rope_theta": self.local_rope_theta},
            },
            "tie_word_embeddings": True,
            "pad_token_id": self.pad_id,
            "eos_token_id": list(self.stop_ids),
            "bos_token_id": self.bos_id,
        }


def _fields_from_hf(text: Mapping[str, Any], family: str) -> dict[str, Any]:
    """ModelConfig fields from a Hugging Face text configuration."""
    layer_types = tuple(text["layer_types"])
    k_eq_v = bool(text.get("attention_k_eq_v", False))
    # Files re-saved by recent transformers carry per-layer overrides instead of the global fields.
    overrides: Mapping[str, Any] = next(iter((text.get("per_layer_config") or {}).values()), {})
    global_head_dim = text.get("global_head_dim") or overrides.get("head_dim")
    if global_head_dim is None:
        raise KeyError("global_head_dim")
    global_kv_heads = text.get("num_global_key_value_heads") or overrides.get("num_key_value_heads")
    if not k_eq_v or global_kv_heads is None:
        global_kv_heads = text["num_key_value_heads"]
    # The unified class has neither per-layer embeddings nor experts, whatever the file says.
    unified = family.startswith("gemma4_unified")
    moe = bool(text.get("enable_moe_block", False)) and not unified
    rope = text["rope_parameters"]
    return {
        "vocab_size": text["vocab_size"],
        "embed_dim": text["hidden_size"],
        "mlp_dim": text["intermediate_size"],
        "num_heads": text["num_attention_heads"],
        "num_kv_heads": text["num_key_value_heads"],
        "num_global_kv_heads": global_kv_heads,
        "head_dim": text["head_dim"],
        "global_head_dim": global_head_dim,
        "layer_types": layer_types,
        "sliding_window": text["sliding_window"],
        "attention_k_eq_v": k_eq_v,
        "num_kv_shared_layers": text.get("num_kv_shared_layers") or 0,
        "use_double_wide_mlp": bool(text.get("use_double_wide_mlp", False)),
        "per_layer_dim": 0 if unified else text["hidden_size_per_layer_input"] or 0,
        "num_experts": text["num_experts"] if moe else 0,
        "num_experts_per_token": text["top_k_experts"] if moe else 0,
        "expert_dim": text["moe_intermediate_size"] if moe else 0,
        "local_rope_theta": float(rope[SLIDING]["rope_theta"]),
        "global_rope_theta": float(rope[FULL]["rope_theta"]),
        "partial_rotary_factor": float(rope[FULL].get("partial_rotary_factor", 0.25)),
        "final_logit_softcap": text.get("final_logit_softcapping") or math.inf,
        "rms_norm_eps": text["rms_norm_eps"],
        "max_position": text["max_position_embeddings"],
        "pad_id": (_id_list(text.get("pad_token_id")) or (0,))[0],
        "eos_id": (_id_list(text.get("eos_token_id")) or (1,))[0],
        "bos_id": (_id_list(text.get("bos_token_id")) or (2,))[0],
    }


def _id_list(value: Any) -> tuple[int, ...]:
    """Token ids written as one number, a list, or null."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _check_constants(text: Mapping[str, Any], where: str) -> None:
    """What every Gemma 4 shares and the modules build in; anything else is refused by name."""
    rope = text["rope_parameters"]
    for field, found, expected in (
        ("hidden_activation", text["hidden_activation"], "gelu_pytorch_tanh"),
        ("attention_bias", bool(text.get("attention_bias")), False),
        ("num_hidden_layers", text["num_hidden_layers"], len(text["layer_types"])),
        (f"rope_parameters.{SLIDING}.rope_type", rope[SLIDING]["rope_type"], "default"),
        (f"rope_parameters.{FULL}.rope_type", rope[FULL]["rope_type"], "proportional"),
    ):
        if found != expected:
            raise ValueError(
                f"{where}: {field} is {found!r}, expected {expected!r} as in every Gemma 4; "
                "this variant cannot be computed here."
            )
