"""How much memory a run takes, from shapes alone.

Parameters, gradients, optimizer state and caches are exact; activations are an estimate from the
tensors that a block keeps for its backward pass.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gemmaqat.config import Experiment
from gemmaqat.models.cache import init_cache
from gemmaqat.models.config import ModelConfig
from gemmaqat.planning.devices import format_bytes
from gemmaqat.planning.parameters import abstract_parameters


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing that occupies memory."""

    name: str
    bytes: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What exists at the fullest moment, all devices together."""

    items: tuple[Item, ...]

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(item.bytes for item in self.items)

    def render(self) -> str:
        """One line per item and the total."""
        rows = [*self.items, Item("total", self.total)]
        width = max(len(item.name) for item in rows)
        lines = [
            f"  {item.name:<{width}}  {format_bytes(item.bytes):>9}  {item.note}" for item in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def training_memory(experiment: Experiment, config: ModelConfig) -> MemoryPlan:
    """Memory of one optimizer step of `experiment` on the model `config`."""
    shapes = abstract_parameters(config)
    count = sum(math.prod(leaf.shape) for leaf in shapes.values())
    params = count * _size(config.param_dtype)
    items = [
        Item("parameters", params, f"{count:,} in {config.param_dtype}"),
        Item("gradients", params),
        Item(
            "optimizer state",
            _optimizer_bytes(experiment, config, shapes),
            f"{experiment.optimizer.name}, first moment in {experiment.optimizer.state_dtype}",
        ),
    ]
    method = experiment.train.method
    if method != "none":
        matrices = sum(math.prod(leaf.shape) for leaf in shapes.values() if len(leaf.shape) >= 2)
        items.append(Item("quantized copy", matrices * _size(config.param_dtype), "of the weights"))
    if method == "distill":
        items.append(Item("teacher", params, "the float model"))
    micro = experiment.data.batch_size // experiment.train.accumulation_steps
    if experiment.train.accumulation_steps > 1:
        items.append(Item("accumulated gradients", params))
    length = experiment.data.sequence_length
    items.append(
        Item(
            "activations",
            activation_bytes(config, rows=micro, length=length),
            f"estimate: {micro} x {length} tokens, remat={config.remat}",
        )
    )
    chunk = min(experiment.train.loss_chunk_tokens or micro * length, micro * length)
    copies = 6 if method == "distill" else 3  # logits, probabilities, their gradient; per model
    items.append(
        Item("logits", copies * chunk * config.vocab_size * 4, f"{chunk:,} positions at once")
    )
    return MemoryPlan(tuple(items))


def generation_memory(
    config: ModelConfig,
    *,
    batch_size: int,
    length: int,
    weight_bytes: int | None = None,
    kv_cache: str | None = None,
) -> MemoryPlan:
    """Memory of decoding `batch_size` sequences of up to `length` positions.

    Args:
        config: the model.
        batch_size: sequences decoded together.
        length: positions of the cache.
        weight_bytes: of the weights where they are packed; None = all in `param_dtype`.
        kv_cache: how keys and values are stored: static, int8 or int4; None = in `dtype`.
    """
    count = sum(math.prod(leaf.shape) for leaf in abstract_parameters(config).values())
    weights = count * _size(config.param_dtype) if weight_bytes is None else weight_bytes
    cache = cache_bytes(config, batch_size=batch_size, length=length, kv_cache=kv_cache)
    stored = kv_cache or config.dtype
    logits = batch_size * config.vocab_size * 4
    return MemoryPlan(
        (
            Item("parameters", weights, f"{count:,}"),
            Item("key/value cache", cache, f"{batch_size} x {length} positions, {stored}"),
            Item("logits", logits, "float32"),
        )
    )


def cache_bytes(
    config: ModelConfig, *, batch_size: int, length: int, kv_cache: str | None = None
) -> int:
    """Bytes of a key/value cache, the scales of codes and its positions included."""
    cache = jax.eval_shape(
        lambda: init_cache(
            config,
            batch_size=batch_size,
            max_length=length,
            dtype=config.dtype,
            quantization=kv_cache,
            static_scales=[(1.0, 1.0)] * config.num_layers,
        )
    )
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))


def activation_bytes(config: ModelConfig, *, rows: int, length: int) -> int:
    """An estimate of what the backward pass of one micro-batch keeps.

    Without rematerialisation every block keeps its matmul inputs, norms' inputs, the gated hidden
    layer and the attention probabilities; with `dots` the matmul results; with `full` one stream
    per block, and all of a single block at a time while it is recomputed.
    """
    blocks = [
        _block_bytes(config, layer, rows=rows, length=length) for layer in range(config.num_layers)
    ]
    stream = rows * length * config.embed_dim * _size(config.dtype)
    if config.per_layer_dim:
        stream += rows * length * config.num_layers * config.per_layer_dim * _size(config.dtype)
    if config.remat == "full":
        streams = config.num_layers * rows * length * config.embed_dim * _size(config.dtype)
        return stream + streams + max(blocks)
    if config.remat == "dots":
        return stream + sum(blocks) // 2 + max(blocks)
    return stream + sum(blocks)


def _block_bytes(config: ModelConfig, layer: int, *, rows: int, length: int) -> int:
    tokens = rows * length
    heads = config.num_heads * config.layer_head_dim(layer)
    kv = 2 * config.layer_kv_heads(layer) * config.layer_head_dim(layer)
    # Norm inputs and outputs around both branches; q before and after norm and rope, and the
    # heads' result; k and v likewise; gate, up, and their product.
    width = 8 * config.embed_dim + 4 * heads + 2 * kv + 4 * config.layer_mlp_dim(layer)
    width += config.num_experts_per_token * (2 * config.embed_dim + 4 * config.expert_dim)
    width += 3 * config.per_layer_dim
    scores = rows * config.num_heads * length * length * 4  # softmax in float32
    return tokens * width * _size(config.dtype) + 2 * scores


def _optimizer_bytes(
    experiment: Experiment, config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> int:
    """First moment in `state_dtype`; second moment in the parameters' dtype, or factored."""
    optimizer = experiment.optimizer
    count = sum(math.prod(leaf.shape) for leaf in shapes.values())
    first = count * _size(optimizer.state_dtype)
    if optimizer.name in ("adamw", "adam"):
        return first + count * _size(config.param_dtype)
    if optimizer.name == "sgd":
        return first if optimizer.b1 else 0
    factored = 0
    for leaf in shapes.values():
        size, shape = math.prod(leaf.shape), leaf.shape
        if len(shape) >= 2 and min(shape[-2:]) >= 32:
            size = size // shape[-1] + size // shape[-2]  # one sum per row and per column
        factored += size * 4
    return factored


def _size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
