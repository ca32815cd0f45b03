"""What a LiteRT export computes against the model it was made from.

    python benchmarks/litert_parity.py [--size e2b_mini] [--recipes none,int8_emb,...]

needs the extra `litert`. A random model of the size is converted by every recipe (static scales
calibrated on random tokens), exported, and run in LiteRT's CPU interpreter beside ours: a prompt
of 20 tokens in signatures of 16, then 64 decode steps that feed both the same tokens. For every
row: the share of weights whose codes and scales the file holds bit for bit, the largest difference
of logits, the mean KL divergence, the share of equal top tokens, and milliseconds per decode step.
"dynamic" lets the runtime quantize activations; "no xnnpack" uses the interpreter's own kernels.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import gemmaqat as gq
from gemmaqat.interop.litert import FILE, read_litert, write_litert
from gemmaqat.interop.litert_session import LiteRTSession
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.shipment import Shipment
from gemmaqat.interop.source import of_model

PROMPT, STEPS, LENGTH = 20, 64, 128


@dataclasses.dataclass(frozen=True)
class Parity:
    """Logits of one run against ours, over the prompt's end and every decode step."""

    logits: np.ndarray  # [STEPS + 1, V]
    reference: np.ndarray
    seconds: float  # of all decode steps

    @property
    def largest(self) -> float:
        """Largest difference of a logit."""
        return float(np.abs(self.logits - self.reference).max())

    @property
    def kl(self) -> float:
        """Mean KL divergence in nats."""
        ours, theirs = (jax.nn.log_softmax(x) for x in (self.reference, self.logits))
        return float(jnp.mean(jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1)))

    @property
    def top(self) -> float:
        """Share of equal most likely tokens."""
        return float(np.mean(self.logits.argmax(-1) == self.reference.argmax(-1)))


def make(size: str, recipe: str, *, seed: int = 0) -> tuple[Any, Shipment]:
    """A random model of a size, converted by a recipe, and its shipment."""
    model = gq.Gemma4(gq.model_config(size), rngs=nnx.Rngs(seed))
    table = gq.resolve(recipe, model)
    if table.activations:
        tokens = np.random.default_rng(seed + 1).integers(0, model.config.vocab_size, (8, 96))
        model = gq.calibrate(model, table, [jnp.asarray(tokens)])
    packed = gq.convert(model, table)
    return packed, of_model(packed, table)


def run_ours(model: Any, ids: np.ndarray, *, quantized_cache: bool) -> np.ndarray:
    """Logits after the prompt and after every further token."""
    step = nnx.jit(lambda m, t, p, c: (lambda o: (o.logits[0, 0], o.cache))(
        m(t, p, cache=c, logits="last")
    ))  # fmt: skip
    kind = {"quantization": "static"} if quantized_cache else {}
    cache = model.init_cache(batch_size=1, max_length=LENGTH, **kind)
    rows, start = [], 0
    for stop in range(PROMPT, len(ids) + 1):
        positions = jnp.arange(start, stop, dtype=jnp.int32)[None]
        logits, cache = step(model, jnp.asarray(ids[None, start:stop]), positions, cache)
        rows.append(np.asarray(logits))
        start = stop
    return np.stack(rows)


def run_theirs(path: Path, ids: np.ndarray, *, xnnpack: bool = True) -> tuple[np.ndarray, float]:
    """The same in the interpreter, and the seconds of the decode steps."""
    session = LiteRTSession(path, xnnpack=xnnpack)
    session.feed(ids[:PROMPT])
    session.feed(ids[PROMPT : PROMPT + 1])  # the first call of a signature prepares its kernels
    session.reset()
    rows = [session.feed(ids[:PROMPT])]
    began = time.perf_counter()
    rows += [session.feed(ids[i : i + 1]) for i in range(PROMPT, len(ids))]
    return np.stack(rows), time.perf_counter() - began


def share_exact(shipment: Shipment, path: Path) -> float:
    """Share of quantized weights whose codes and scales come back bit for bit; NaN of none."""
    back, exact, total = read_litert(path), 0, 0
    for tensor in shipment.tensors.values():
        if tensor.grid is None:
            continue
        ours, theirs = (s.tensors[tensor.path].read(0, tensor.num_rows) for s in (shipment, back))
        same = np.array_equal(ours.codes, theirs.codes) & np.array_equal(
            np.asarray(ours.scales, np.float32).view(np.uint32),
            np.asarray(theirs.scales, np.float32).view(np.uint32),
        )
        exact, total = exact + same * tensor.num_weights, total + tensor.num_weights
    return exact / total if total else float("nan")


def compare(size: str, recipe: str, *, dynamic: bool, xnnpack: bool) -> tuple[float, Parity]:
    """Share of exact weights and the parity of one recipe."""
    model, shipment = make(size, recipe)
    with tempfile.TemporaryDirectory() as name:
        write_litert(
            shipment,
            Path(name),
            ExportOptions(prefill_lengths=(16,), cache_length=LENGTH, dynamic_activations=dynamic),
        )
        return compare_written(model, shipment, Path(name), xnnpack=xnnpack)


def compare_written(
    model: Any, shipment: Shipment, folder: Path, *, xnnpack: bool
) -> tuple[float, Parity]:
    """The same of an export that exists, with a cache of LENGTH positions."""
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, PROMPT + STEPS)
    logits, seconds = run_theirs(folder / FILE, ids, xnnpack=xnnpack)
    static = any(entry.path.endswith("self_attn/k") for entry in shipment.table.activations)
    reference = run_ours(model, ids, quantized_cache=static)
    return share_exact(shipment, folder), Parity(logits, reference, seconds)


def main() -> None:
    """Prints one row per recipe and way of running it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="e2b_mini")
    parser.add_argument(
        "--recipes",
        default="none,int8_emb,int4_channel_emb,int2_channel_emb,q4_0_emb,mobile_e2b_mini",
    )
    options = parser.parse_args()
    print("recipe, way | codes and scales exact | largest logit difference | mean KL | top-1 | ms")
    for recipe in options.recipes.split(","):
        ways = [("", False, True), ("no xnnpack", False, False)]
        ways += [("dynamic", True, True)] if "channel" in recipe or "int8" in recipe else []
        for label, dynamic, xnnpack in ways:
            share, found = compare(options.size, recipe, dynamic=dynamic, xnnpack=xnnpack)
            held = "-" if np.isnan(share) else f"{share:.0%}"
            print(
                f"{recipe} {label} | {held} | {found.largest:.2g} | {found.kl:.2g} | "
                f"{found.top:.1%} | {1000 * found.seconds / STEPS:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
