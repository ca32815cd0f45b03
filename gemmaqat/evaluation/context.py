"""Perplexity against context length, through the real cache of each kind.

The documents of a hold-out go through the cache in chunks, teacher-forced: every token is scored
from the keys and values as they are stored, so what is measured is the storage itself and not an
emulation of it. Kinds are compared document by document, on the same resamples.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gemmaqat.data.packing import Batch
from gemmaqat.evaluation.metrics import token_nll
from gemmaqat.evaluation.statistics import Bootstrap, Interval, Sums
from gemmaqat.json_file import read_json
from gemmaqat.models.cache import KVCache
from gemmaqat.quantization.activations import activation_scales, with_scales

FLOAT = "float"  # the name of a cache of floats
FILE = "context.json"
FORMAT_VERSION = 1
CHUNK = 32  # tokens of a document that go through the cache at once
_FIRST_EDGE = 16
_KV_SCALES = ("/self_attn/k/scale", "/self_attn/v/scale")


@dataclasses.dataclass(frozen=True)
class ContextScores:
    """Loss by position of one model with one kind of cache, of `N` documents in `P` buckets.

    Attributes:
        edges: P + 1 positions; bucket i holds the tokens at positions edges[i] <= p < edges[i + 1],
            which see p + 1 tokens (those of sliding layers at most a window).
        nll: negative log-likelihood in nats, summed.
        tokens: how many tokens were summed.
        kv_bytes: of the keys and values of one document of the longest length.
    """

    edges: tuple[int, ...]
    nll: Float[np.ndarray, "N P"]
    tokens: Float[np.ndarray, "N P"]
    kv_bytes: int

    def sums(self, bucket: int) -> Sums:
        """Sums of the documents that have tokens in one bucket."""
        reached = self.tokens[:, bucket] > 0
        return Sums(self.nll[reached, bucket], self.tokens[reached, bucket])

    @property
    def perplexity(self) -> Float[np.ndarray, " P"]:
        """Of each bucket."""
        return np.exp(np.sum(self.nll, axis=0) / np.sum(self.tokens, axis=0))


def perplexity_by_position(
    model: Any, batches: Sequence[Batch], *, kv_cache: str | None = None, chunk: int = CHUNK
) -> ContextScores:
    """Scores every document of a hold-out through the model's cache.

    Hooks that quantize keys and values (of a model prepared for a static cache) are on for
    "static" and off for every other kind: the storage is then the only quantization of them.

    Args:
        model: float, or with quantized weights.
        batches: packed rows; every segment is one document. Only tokens of loss weight 1 count.
        kv_cache: None (floats), "static", "int8" or "int4", as in `generate`.
        chunk: tokens that go through at once.

    Raises:
        ValueError: no document, or a static cache for a model without scales.
    """
    documents = _documents(batches, chunk)
    if not documents:
        raise ValueError("perplexity by position: the hold-out has no document; give more data.")
    length = max(batch["tokens"].shape[1] for batch in documents)
    edges = _edges(length)
    graphdef, params = nnx.split(model)
    if kv_cache != "static":
        hooks = [path for path in activation_scales(params) if path.endswith(_KV_SCALES)]
        params = with_scales(params, dict.fromkeys(hooks, 0.0))
    nll, tokens = [], []
    for batch in documents:
        rows = len(batch["tokens"])
        cache = model.init_cache(batch_size=rows, max_length=length, quantization=kv_cache)
        kv_bytes = cache.kv_bytes // rows
        losses = []
        for start in range(0, batch["tokens"].shape[1], chunk):
            part = {name: field[:, start : start + chunk] for name, field in batch.items()}
            found, cache = _score_chunk(
                graphdef, params, part["tokens"], part["targets"], part["positions"], cache=cache
            )
            losses.append(np.asarray(found, np.float64))
        counted = batch["loss_weights"] >= 1
        loss = np.where(counted, np.concatenate(losses, axis=1), 0.0)
        used = counted.any(axis=1)
        nll.append(_by_bucket(loss, edges)[used])
        tokens.append(_by_bucket(counted.astype(np.float64), edges)[used])
    return _without_empty(edges, np.concatenate(nll), np.concatenate(tokens), kv_bytes)


def compare_caches(
    model: Any, batches: Sequence[Batch], kv_caches: Sequence[str]
) -> dict[str, ContextScores]:
    """Scores by kind of cache, `FLOAT` first; arguments as in `perplexity_by_position`."""
    found = {FLOAT: perplexity_by_position(model, batches)}
    return found | {
        kind: perplexity_by_position(model, batches, kv_cache=kind) for kind in kv_caches
    }


def render(scores: Mapping[str, ContextScores], *, samples: int = 2_000) -> str:
    """A Markdown table: perplexity of the float cache by position, and each other kind's change.

    Changes are in percent, with paired bootstrap intervals over documents.

    Args:
        scores: by kind of cache, `FLOAT` among them, all of the same documents.
        samples: resamples of the bootstrap.
    """
    base = scores[FLOAT]
    others = [name for name in scores if name != FLOAT]
    lines = [
        "| positions | tokens | " + " | ".join([FLOAT, *others]) + " |",
        "|---|--:|" + "--:|" * len(scores),
    ]
    for bucket, (first, end) in enumerate(zip(base.edges, base.edges[1:], strict=False)):
        cells = [f"{first}-{end - 1}", f"{int(base.tokens[:, bucket].sum()):,}"]
        cells.append(f"{base.perplexity[bucket]:.4f}")
        for name in others:
            found = relative_change(base, scores[name], bucket, samples=samples)
            value, low, high = (100 * x for x in dataclasses.astuple(found))
            cells.append(f"{value:+.3f} % [{low:+.3f}, {high:+.3f}]")
        lines.append("| " + " | ".join(cells) + " |")
    sizes = [f"{scores[name].kv_bytes:,}" for name in (FLOAT, *others)]
    lines.append("| bytes of a full cache | | " + " | ".join(sizes) + " |")
    return "\n".join(lines)


def relative_change(
    base: ContextScores, other: ContextScores, bucket: int, *, samples: int = 2_000
) -> Interval:
    """Relative change of perplexity in one bucket, paired by document.

    Documents that are too short for the bucket are no part of it.
    """
    reference, found = base.sums(bucket), other.sums(bucket)
    bootstrap = Bootstrap(len(reference.tokens), samples=samples)
    return bootstrap.interval(
        lambda weights: np.exp(found.mean(weights) - reference.mean(weights)) - 1
    )


def save(folder: Path, scores: Mapping[str, ContextScores]) -> None:
    """Writes context.json."""
    folder.mkdir(parents=True, exist_ok=True)
    caches = {
        name: dict(
            edges=found.edges,
            nll=found.nll.tolist(),
            tokens=found.tokens.tolist(),
            kv_bytes=found.kv_bytes,
        )
        for name, found in scores.items()
    }
    draft = folder / f".{FILE}.tmp"
    draft.write_text(json.dumps(dict(format_version=FORMAT_VERSION, caches=caches)) + "\n")
    draft.replace(folder / FILE)


def load(folder: Path) -> dict[str, ContextScores]:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is of another format version.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; evaluate with config.evaluation.kv_caches set."
        )
    saved = read_json(path, "restore it from a copy")
    if saved["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {saved['format_version']!r}, this version reads "
            f"{FORMAT_VERSION}; use the version of gemmaqat that wrote it."
        )
    return {
        name: ContextScores(
            edges=tuple(found["edges"]),
            nll=np.asarray(found["nll"]),
            tokens=np.asarray(found["tokens"]),
            kv_bytes=found["kv_bytes"],
        )
        for name, found in saved["caches"].items()
    }


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _score_chunk(
    graphdef: Any, params: Any, tokens: Array, targets: Array, positions: Array, *, cache: KVCache
) -> tuple[Array, KVCache | None]:
    model = nnx.merge(graphdef, params)
    out = model(jnp.asarray(tokens), positions, cache=cache, logits="none")
    return token_nll(model.head, out.hidden, targets, chunk_tokens=0), out.cache


def _documents(batches: Sequence[Batch], chunk: int) -> list[Batch]:
    """Every segment as a row of its own from position 0, in batches of as many rows as before."""
    names = ("tokens", "targets", "loss_weights", "positions")
    parts = [
        {name: batch[name][row, batch["segment_ids"][row] == segment] for name in names}
        for batch in batches
        for row in range(len(batch["tokens"]))
        for segment in np.unique(batch["segment_ids"][row])
        if segment
    ]
    parts = [part for part in parts if (part["loss_weights"] >= 1).any()]
    if not parts:
        return []
    rows, width = len(batches[0]["tokens"]), max(len(part["tokens"]) for part in parts)
    shape = (-(-len(parts) // rows) * rows, -(-width // chunk) * chunk)
    padded = {
        name: np.full(shape, -1 if name == "positions" else 0, parts[0][name].dtype)
        for name in names
    }
    for index, part in enumerate(parts):
        for name in names:
            padded[name][index, : len(part[name])] = part[name]
    return [
        {name: field[start : start + rows] for name, field in padded.items()}
        for start in range(0, shape[0], rows)
    ]


def _edges(length: int) -> tuple[int, ...]:
    """0, 16, 32, 64, ... up to the length: every bucket twice as far as the one before."""
    edges = [0, _FIRST_EDGE]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return (*edges[:-1], max(length, 1)) if edges[-2] < length else (0, length)


def _by_bucket(values: np.ndarray, edges: tuple[int, ...]) -> np.ndarray:
    return np.stack(
        [values[:, a:b].sum(axis=1) for a, b in zip(edges, edges[1:], strict=False)], axis=1
    )


def _without_empty(
    edges: tuple[int, ...], nll: np.ndarray, tokens: np.ndarray, kv_bytes: int
) -> ContextScores:
    """Joins buckets without a token to the one before: their perplexity would be no number."""
    kept = [i for i in range(tokens.shape[1]) if tokens[:, i].any()]
    joined = tuple(edges[i] for i in kept)
    return ContextScores((*joined, edges[kept[-1] + 1]), nll[:, kept], tokens[:, kept], kv_bytes)
