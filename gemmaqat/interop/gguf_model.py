"""Architecture `gemma4` in GGUF: tensor names and metadata, from our configuration and back.

Names and keys are those of llama.cpp's converter; the metadata says nothing of `attention_k_eq_v`
or the partial rotary factor, which are read off the tensors (no value projection, `rope_freqs`).
"""

import math
import re
from typing import Any

import numpy as np

from gemmaqat.interop.gguf_file import GgufFile
from gemmaqat.models.config import FULL, SLIDING, ModelConfig

ARCHITECTURE = "gemma4"
ROPE_FACTORS = "rope_freqs.weight"
HEAD = "output.weight"  # only of models whose head is not tied
STOP_IDS = "gemmaqat.stop_token_ids"

_UNROTATED = 1e30  # divides the frequency of a pair that stands still
_MAX_LAYERS = 1024

_GLOBAL = {
    "embed_tokens/weight": "token_embd.weight",
    "embed_tokens_per_layer/weight": "per_layer_token_embd.weight",
    "per_layer_model_projection/weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm/weight": "per_layer_proj_norm.weight",
    "norm/weight": "output_norm.weight",
}
_LAYER = {
    "input_layernorm/weight": "attn_norm.weight",
    "self_attn/q_proj/weight": "attn_q.weight",
    "self_attn/k_proj/weight": "attn_k.weight",
    "self_attn/v_proj/weight": "attn_v.weight",
    "self_attn/o_proj/weight": "attn_output.weight",
    "self_attn/q_norm/weight": "attn_q_norm.weight",
    "self_attn/k_norm/weight": "attn_k_norm.weight",
    "post_attention_layernorm/weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm/weight": "ffn_norm.weight",
    "post_feedforward_layernorm/weight": "post_ffw_norm.weight",
    "mlp/gate_proj/weight": "ffn_gate.weight",
    "mlp/up_proj/weight": "ffn_up.weight",
    "mlp/down_proj/weight": "ffn_down.weight",
    "layer_scalar": "layer_output_scale.weight",
    "per_layer_input_gate/weight": "inp_gate.weight",
    "per_layer_projection/weight": "proj.weight",
    "post_per_layer_input_norm/weight": "post_norm.weight",
    "router/proj/weight": "ffn_gate_inp.weight",
    "router/scale": "ffn_gate_inp.scale",
    "router/per_expert_scale": "ffn_down_exps.scale",
    "experts/gate_up_proj/weight": "ffn_gate_up_exps.weight",
    "experts/down_proj/weight": "ffn_down_exps.weight",
    "pre_feedforward_layernorm_2/weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1/weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2/weight": "post_ffw_norm_2.weight",
}
_UNUSED_SHARED = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")


def tensor_name(path: str) -> str | None:
    """The GGUF name of one of our parameters; None if llama.cpp knows no such tensor."""
    match = re.fullmatch(r"layers/(\d+)/(.*)", path)
    if match is None:
        return _GLOBAL.get(path)
    name = _LAYER.get(match[2])
    return f"blk.{match[1]}.{name}" if name else None


def is_unused(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is a key or value of a layer that reads those of another."""
    match = re.fullmatch(r"blk\.(\d+)\.(.*)", name)
    if match is None or match[2] not in _UNUSED_SHARED:
        return False
    return config.first_shared_layer <= int(match[1]) < config.num_layers


def rope_factors(config: ModelConfig) -> np.ndarray:
    """float32 divisors of the frequencies of full-attention layers, one per pair."""
    pairs = config.global_head_dim // 2
    rotating = int(config.partial_rotary_factor * config.global_head_dim // 2)
    return np.array([1.0] * rotating + [_UNROTATED] * (pairs - rotating), np.float32)


def config_metadata(config: ModelConfig) -> dict[str, Any]:
    """Every key of the architecture. Of Python's types: int is uint32, float is float32.

    Arrays and keys that could have been left out are written always: what llama.cpp assumes in
    place of a missing one is wrong for some model.

    Raises:
        ValueError: llama.cpp would let a layer share the keys of another one than we do.
    """
    _check_sharing(config)
    layers = range(config.num_layers)
    kv_heads = [config.layer_kv_heads(i) for i in layers]
    widths = [config.layer_mlp_dim(i) for i in layers]
    cap = config.final_logit_softcap
    fields: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.embed_dim,
        "vocab_size": config.vocab_size,
        "feed_forward_length": widths if len(set(widths)) > 1 else widths[0],
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": kv_heads if len(set(kv_heads)) > 1 else kv_heads[0],
        "attention.key_length": config.global_head_dim,
        "attention.value_length": config.global_head_dim,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [config.is_sliding(i) for i in layers],
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "embedding_length_per_layer_input": config.per_layer_dim,
        "rope.freq_base": float(config.global_rope_theta),
        "rope.freq_base_swa": float(config.local_rope_theta),
        "rope.dimension_count": config.global_head_dim,
        "rope.dimension_count_swa": config.head_dim,
        # A missing cap is taken as 30.
        "final_logit_softcapping": 0.0 if math.isinf(cap) else float(cap),
    }
    if config.num_experts:
        fields |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_token,
            "expert_feed_forward_length": config.expert_dim,
        }
    return {f"{ARCHITECTURE}.{key}": value for key, value in fields.items()}


def _check_sharing(config: ModelConfig) -> None:
    """llama.cpp takes the last two owning layers for a sliding and a full-attention one."""
    first = config.first_shared_layer
    for layer in range(first, config.num_layers):
        source = first - 2 if config.is_sliding(layer) else first - 1
        if source < 0 or config.is_sliding(source) != config.is_sliding(layer):
            raise ValueError(
                f"model {config.name!r}: of {config.num_layers} layers the last "
                f"{config.num_kv_shared_layers} share keys, and llama.cpp reads those of layers "
                f"{first - 2} and {first - 1}, which must be a sliding and a full-attention layer; "
                "choose num_kv_shared_layers so that sharing begins after a full-attention layer, "
                "or export another format."
            )


def _check_ids(config: ModelConfig) -> None:
    """Every special token has a row."""
    for token in (config.pad_id, config.eos_id, config.bos_id, *config.stop_ids):
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"special token {token} is outside the vocabulary of {config.vocab_size}; the "
                "tokenizer belongs to another model."
            )


def read_config(file: GgufFile) -> ModelConfig:
    """The configuration that metadata and tensors of a file describe.

    Raises:
        ValueError: another architecture, a key missing or of the wrong kind, or metadata and
            tensors that contradict each other.
    """
    where = file.path
    family = file.require("general.architecture", str, "a string")
    if family != ARCHITECTURE:
        raise ValueError(
            f"{where}: general.architecture is {family!r}, expected {ARCHITECTURE!r}; give the "
            "GGUF of a Gemma 4 text decoder (a projector file is none)."
        )
    keys = _Keys(file)
    num_layers = keys.integer("block_count", most=_MAX_LAYERS)
    sliding = keys.flags("attention.sliding_window_pattern", num_layers)
    layer_types = tuple(SLIDING if flag else FULL for flag in sliding)
    full = [i for i in range(num_layers) if not sliding[i]]
    if not full:
        raise ValueError(f"{where}: no layer of the sliding window pattern has full attention.")
    kv_heads = keys.per_layer("attention.head_count_kv", num_layers)
    heads = keys.alike("attention.head_count", range(num_layers), num_layers)
    shared = keys.integer("attention.shared_kv_layers", least=0, most=num_layers - 1, default=0)
    widths = keys.per_layer("feed_forward_length", num_layers)
    owning = num_layers - shared
    mlp_dim = keys.same("feed_forward_length", widths[:owning])
    shared_width = keys.same("feed_forward_length", widths[owning:] or [mlp_dim])
    if shared_width not in (mlp_dim, 2 * mlp_dim):
        raise ValueError(
            f"{where}: feed_forward_length is {shared_width} in layers that share keys and "
            f"{mlp_dim} before them; expected the same or twice as many."
        )
    no_value = {f"blk.{i}.attn_v.weight" not in file.tensors for i in full if i < owning}
    if len(no_value) > 1:
        raise ValueError(f"{where}: some full-attention layers have attn_v.weight, others do not.")
    cap = keys.real("final_logit_softcapping", default=30.0)
    experts = keys.integer("expert_count", least=0, default=0)
    global_kv = keys.same("attention.head_count_kv", [kv_heads[i] for i in full])
    local = [kv_heads[i] for i in range(num_layers) if sliding[i]]
    head_dim = keys.integer("attention.key_length")
    eos = _token(file, "eos", 1)
    stop = file.metadata.get(STOP_IDS)
    try:
        config = ModelConfig(
            name=_name(file),
            vocab_size=_vocabulary(file),
            embed_dim=keys.integer("embedding_length"),
            mlp_dim=mlp_dim,
            num_heads=heads,
            num_kv_heads=keys.same("attention.head_count_kv", local or [global_kv]),
            num_global_kv_heads=global_kv,
            head_dim=keys.integer("attention.key_length_swa"),
            global_head_dim=head_dim,
            layer_types=layer_types,
            sliding_window=keys.integer("attention.sliding_window"),
            attention_k_eq_v=no_value == {True},
            num_kv_shared_layers=shared,
            use_double_wide_mlp=shared_width != mlp_dim,
            per_layer_dim=keys.integer("embedding_length_per_layer_input", least=0),
            num_experts=experts,
            num_experts_per_token=keys.integer("expert_used_count") if experts else 0,
            expert_dim=keys.integer("expert_feed_forward_length") if experts else 0,
            local_rope_theta=keys.real("rope.freq_base_swa", default=10_000.0),
            global_rope_theta=keys.real("rope.freq_base"),
            partial_rotary_factor=_rotary_factor(file, head_dim),
            final_logit_softcap=cap or math.inf,
            rms_norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
            max_position=keys.integer("context_length"),
            pad_id=_token(file, "padding", 0),
            eos_id=eos,
            bos_id=_token(file, "bos", 2),
            stop_ids=_ids(stop) or tuple(dict.fromkeys((eos, _token(file, "eot", eos)))),
        )
        _check_sharing(config)
        _check_ids(config)
        return config
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(where)) else f"{where}: {text}") from None


class _Keys:
    """The numbers of the architecture's metadata, each checked when it is asked for."""

    def __init__(self, file: GgufFile):
        self.file = file

    def integer(
        self, key: str, *, least: int = 1, most: int = 2**31 - 1, default: int | None = None
    ) -> int:
        value = self._value(key, int, f"a whole number from {least} to {most}", default)
        if not least <= value <= most:
            raise ValueError(
                f"{self.file.path}: metadata key '{ARCHITECTURE}.{key}' is {value}, expected "
                f"{least} to {most}."
            )
        return value

    def real(self, key: str, *, default: float | None = None) -> float:
        value = self._value(key, float, "a number", default)
        if not 0 <= value < math.inf:  # NaN, too
            raise ValueError(
                f"{self.file.path}: metadata key '{ARCHITECTURE}.{key}' is {value}, expected a "
                "finite number that is not negative."
            )
        # A float32 of 1e-6 is 9.99999997e-07: back to the shortest decimal that means it.
        return float(str(np.float32(value)))

    def flags(self, key: str, count: int) -> list[bool]:
        value = self._value(key, np.ndarray, f"{count} flags, one per layer", None)
        if value.dtype != bool or len(value) != count:
            raise ValueError(
                f"{self.file.path}: metadata key '{ARCHITECTURE}.{key}' holds {len(value)} values "
                f"of {value.dtype}, expected {count} flags, one per layer."
            )
        return value.tolist()

    def per_layer(self, key: str, count: int) -> list[int]:
        """One number per layer, or one for all."""
        value = self._value(key, (int, np.ndarray), "a whole number, or one per layer", None)
        if isinstance(value, int):
            value = np.full(count, value)
        if value.dtype.kind not in "iu" or len(value) != count or np.any(value < 1):
            raise ValueError(
                f"{self.file.path}: metadata key '{ARCHITECTURE}.{key}' is not a positive number, "
                f"or one for each of {count} layers."
            )
        return value.tolist()

    def alike(self, key: str, layers: range, count: int) -> int:
        values = self.per_layer(key, count)
        return self.same(key, [values[i] for i in layers])

    def same(self, key: str, values: list[int]) -> int:
        if len(set(values)) > 1:
            raise ValueError(
                f"{self.file.path}: metadata key '{ARCHITECTURE}.{key}' differs between layers of "
                f"one kind ({sorted(set(values))}); no Gemma 4 does."
            )
        return int(values[0])

    def _value(self, key: str, kinds: Any, words: str, default: Any) -> Any:
        key = f"{ARCHITECTURE}.{key}"
        if default is not None and key not in self.file.metadata:
            return default
        return self.file.require(key, kinds, words)


def _name(file: GgufFile) -> str:
    name = file.metadata.get("general.name")
    return name if isinstance(name, str) and name else file.path.stem


def _vocabulary(file: GgufFile) -> int:
    """Rows of the token table, as many as there are tokens."""
    table, tokens = (
        file.tensors.get("token_embd.weight"),
        file.metadata.get("tokenizer.ggml.tokens"),
    )
    if table is None or len(table.shape) != 2:
        raise ValueError(f"{file.path}: the matrix 'token_embd.weight' is missing.")
    if isinstance(tokens, tuple) and len(tokens) != table.shape[0]:
        raise ValueError(
            f"{file.path}: {len(tokens)} tokens, but token_embd.weight has {table.shape[0]} rows; "
            "the tokenizer belongs to another model."
        )
    return table.shape[0]


def _rotary_factor(file: GgufFile, head_dim: int) -> float:
    """Twice the number of rotating pairs over the head size, from the divisors of frequencies."""
    info = file.tensors.get(ROPE_FACTORS)
    if info is None or info.kind.name != "F32" or info.shape != (head_dim // 2,):
        raise ValueError(
            f"{file.path}: {ROPE_FACTORS!r} is not there as {head_dim // 2} float32 numbers, which "
            "say how much of a full-attention head rotates; convert the checkpoint again."
        )
    factors = file.rows(ROPE_FACTORS, 0, 1).view("<f4")[0]
    rotating = int(np.sum(factors == 1.0))
    if not (np.all(factors[:rotating] == 1.0) and np.all(factors[rotating:] >= 1e29)):
        raise ValueError(
            f"{file.path}: {ROPE_FACTORS!r} is not some ones followed by 1e30, as in every Gemma "
            "4; this variant cannot be computed here."
        )
    return 2 * rotating / head_dim


def _token(file: GgufFile, role: str, default: int) -> int:
    value = file.metadata.get(f"tokenizer.ggml.{role}_token_id", default)
    return value if isinstance(value, int) else default


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return tuple(value.tolist())
    return ()
