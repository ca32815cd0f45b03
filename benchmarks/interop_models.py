"""Small trained models of the five topologies, and how far one program's logits are from another's.

Readers of exported files are compared on these: one per topology, and one whose rows are multiples
of 256, which Q6_K and Q2_K need.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gemmaqat as gq
from gemmaqat.data.tasks import example
from gemmaqat.interop.shipment import Shipment, ShippedTensor
from gemmaqat.interop.source import of_model, to_model, values
from gemmaqat.models.config import ModelConfig
from gemmaqat.quantization.activations import activation_scales, prepare, with_scales
from gemmaqat.quantization.calibration import calibrate

LEAD = 0.02  # see `decided`
LENGTH = 128  # four times the window of the miniatures
SEQUENCES = 4

SHAPES: dict[str, ModelConfig] = {
    "e2b": gq.model_config("e2b_mini"),
    "e4b": gq.model_config("e4b_mini"),
    "12b": gq.model_config("12b_mini"),
    "26b_a4b": gq.model_config("26b_a4b_mini"),
    "31b": gq.model_config("31b_mini"),
    "e2b_wide": gq.model_config(
        "e2b_mini", embed_dim=256, mlp_dim=256, num_heads=4, head_dim=64, global_head_dim=64,
        per_layer_dim=256,
    ),
}  # fmt: skip
# Of 8 experts, as the miniature has, llama.cpp's quantizer concludes that keys and values want 8
# bits (Mixtral has 8); the 26B-A4B has 128. Only comparisons with that quantizer need this one.
NOT_EIGHT_EXPERTS = "26b_a4b_x16"


class Distance(NamedTuple):
    """How far logits are from a reference, over all positions."""

    mean_kl: float  # nats, of the reference's distribution
    largest: float  # largest difference of a logit
    top_1: float  # share of positions with the same most likely token


def texts(count: int, *, holdout: bool) -> np.ndarray:
    """int32 `[count, LENGTH]` byte ids of task texts that follow one another, after a <bos>."""
    rows, index = [], 0
    while len(rows) < count:
        row = b"\x02"
        while len(row) < LENGTH:
            item = example(7, index, holdout=holdout)
            row += f"{item.prompt}{item.answer}\n".encode()
            index += 1
        rows.append(np.frombuffer(row[:LENGTH], np.uint8).astype(np.int32))
    return np.stack(rows)


@functools.cache
def trained(shape: str, steps: int = 200) -> gq.Gemma4:
    """A model after some steps of Adam on task texts, in float32."""
    if shape == NOT_EIGHT_EXPERTS:
        config = gq.model_config("26b_a4b_mini", num_experts=16)
    else:
        config = SHAPES[shape]
    graph, state = nnx.split(gq.Gemma4(config, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, steps))
    data = texts(8 * steps, holdout=False).reshape(steps, 8, LENGTH)

    @jax.jit
    def step(carry, ids):
        state, moments = carry

        def loss(state):
            logits = nnx.merge(graph, state, copy=True)(ids).logits[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        updates, moments = optimizer.update(jax.grad(loss)(state), moments)
        return optax.apply_updates(state, updates), moments

    carry = (state, optimizer.init(state))
    for ids in data:
        carry = step(carry, ids)
    return nnx.merge(graph, carry[0])


@functools.cache
def quantized(shape: str, recipe: str) -> Shipment:
    """The trained model, rounded to a recipe."""
    model = trained(shape)
    table = gq.resolve(recipe, model)
    return of_model(gq.convert(model, table), table)


@functools.cache
def mobile(shape: str) -> Shipment:
    """The trained model in the mobile scheme, with the clamps that transformers applies.

    It knows neither those of keys and values nor those of the projection that stays float, and
    loads one scale per row of the per-layer table.
    """
    size = "mobile_e4b_mini" if shape == "e4b" else "mobile_e2b_mini"
    bits = "int2" if shape == "e4b" else "int4"
    table_rule = dict(module_path="embed_tokens_per_layer", weight_qtype=bits, scale_rule="mse")
    model = trained(shape)
    table = gq.resolve(size, model, rules=[table_rule])
    batches = [{"tokens": jnp.asarray(texts(SEQUENCES, holdout=False))}]
    model = calibrate(prepare(model, table), table, batches)
    off = [
        path for path in activation_scales(model)
        if re.search(r"self_attn/[kv](/scale)?$|^per_layer_model_projection", path)
    ]  # fmt: skip
    model = with_scales(model, dict.fromkeys(off, 0.0))
    return of_model(gq.convert(model, table), table)


def decoded(shipment: Shipment) -> Shipment:
    """The same values in float32, nothing quantized."""

    def floats(tensor: ShippedTensor) -> ShippedTensor:
        def read(start: int, stop: int) -> np.ndarray:
            return values(tensor, tensor.read(start, stop))

        if tensor.grid is None:
            return tensor
        return dataclasses.replace(tensor, grid=None, dtype=np.dtype(np.float32), read=read)

    tensors = {path: floats(tensor) for path, tensor in shipment.tensors.items()}
    return dataclasses.replace(shipment, tensors=tensors)


def our_logits(shipment: Shipment, ids: np.ndarray) -> np.ndarray:
    """float32 `[B, T, V]` of our own packed model."""
    return np.asarray(to_model(shipment)(jnp.asarray(ids)).logits)


def distance(reference: np.ndarray, other: np.ndarray) -> Distance:
    """Of two arrays of logits of one shape."""
    left, right = (_log_softmax(part.astype(np.float64)) for part in (reference, other))
    return Distance(
        float(np.mean(np.sum(np.exp(left) * (left - right), axis=-1))),
        float(np.max(np.abs(reference - other))),
        float(np.mean(reference.argmax(-1) == other.argmax(-1))),
    )


def decided(logits: np.ndarray) -> np.ndarray:
    """Positions where the most likely token leads the next by `LEAD` of probability, bool.

    Elsewhere two tokens are as good as equal (a random letter of a prompt), and the order of sums
    may choose.
    """
    probabilities = np.sort(np.exp(_log_softmax(logits)), axis=-1)
    return probabilities[..., -1] - probabilities[..., -2] >= LEAD


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def only_file(folder: Path, pattern: str) -> Path:
    """The one file of a folder that matches."""
    (path,) = folder.glob(pattern)
    return path
