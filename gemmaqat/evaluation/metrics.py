"""Per-token metrics from hidden states, a chunk of positions at a time.

The logits of 4,096 tokens over 262,144 entries are 4.3 GB in float32. Every function here takes
hidden states and the head that turns them into logits, and scans over chunks of positions. The
chunk's body is checkpointed, so that neither the forward pass nor its gradient ever holds the
logits of more than one chunk.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

AnyArray = Array | np.ndarray  # on the device, or fetched from it

# Hidden states [M, D] to logits [M, V]. It may close over parameters; they get gradients.
Head = Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMetrics:
    """What one model does at every position, beside `R` reference models.

    Attributes:
        nll: negative log-likelihood of the target, nats.
        correct: the most likely token is the target.
        kl: KL(reference || model) of the next-token distribution, nats.
        agree: model and reference have the same most likely token.
    """

    nll: Float[AnyArray, "B T"]
    correct: Bool[AnyArray, "B T"]
    kl: Float[AnyArray, "B T R"]
    agree: Bool[AnyArray, "B T R"]


def token_nll(
    head: Head, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], *, chunk_tokens: int
) -> Float[Array, "B T"]:
    """Negative log-likelihood of every target, nats, float32; differentiable.

    Args:
        head: hidden states to logits.
        hidden: the model's hidden states.
        targets: the token that should follow each position.
        chunk_tokens: most tokens whose logits exist at once; 0 takes all and recomputes nothing.
    """

    def rows(hidden, targets):
        return _nll(_logits(head, hidden), targets)

    return _over_chunks(rows, (hidden, targets), chunk_tokens)


def token_kl(
    head: Head,
    hidden: Float[Array, "B T D"],
    reference_head: Head,
    reference_hidden: Float[Array, "B T Dr"],
    *,
    chunk_tokens: int,
) -> Float[Array, "B T"]:
    """KL(reference || model) at every position, nats, float32.

    Differentiable in `hidden` and through `head`; the reference is a constant. `chunk_tokens` as
    in `token_nll`.
    """

    def rows(hidden, reference_hidden):
        reference = jax.lax.stop_gradient(_logits(reference_head, reference_hidden))
        return _kl(reference, _logits(head, hidden))

    return _over_chunks(rows, (hidden, reference_hidden), chunk_tokens)


def token_comparison(
    head: Head,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    references: Sequence[tuple[Head, Array]],
    *,
    chunk_tokens: int,
) -> TokenMetrics:
    """All metrics of one model in one pass over the chunks.

    Args:
        head: hidden states to logits.
        hidden: the model's hidden states.
        targets: the token that should follow each position.
        references: (head, hidden states [B, T, any]) of each model to compare with; may be empty.
        chunk_tokens: as in `token_nll`.
    """
    reference_heads = [reference_head for reference_head, _ in references]

    def rows(hidden, targets, *reference_hidden):
        logits = _logits(head, hidden)
        best = jnp.argmax(logits, axis=-1)
        kl = [jnp.zeros((logits.shape[0], 0), jnp.float32)]
        agree = [jnp.zeros((logits.shape[0], 0), bool)]
        for reference_head, states in zip(reference_heads, reference_hidden, strict=True):
            reference = _logits(reference_head, states)
            kl.append(_kl(reference, logits)[:, None])
            agree.append((jnp.argmax(reference, axis=-1) == best)[:, None])
        nll = _nll(logits, targets)
        return nll, best == targets, jnp.concatenate(kl, -1), jnp.concatenate(agree, -1)

    arrays = (hidden, targets, *(states for _, states in references))
    return TokenMetrics(*_over_chunks(rows, arrays, chunk_tokens))


def _logits(head: Head, hidden: Array) -> Array:
    # Float32 before any softmax, whatever the compute dtype: bfloat16 loses percents there.
    return head(hidden).astype(jnp.float32)


def _nll(logits: Array, targets: Array) -> Array:
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logits


def _kl(reference_logits: Array, logits: Array) -> Array:
    """KL(reference || model) of [M, V] logits.

    Summed as p log(p/q) + q - p: the added terms sum to zero, every term is at least zero, and
    the rounding error of the two normalisers (1e-6, more than the whole KL of a good 8-bit model)
    enters squared. With d = log(p/q) a term is p (d + expm1(-d)), free of cancellation when d is
    small; the plain form serves where expm1 could overflow.
    """
    log_p = jax.nn.log_softmax(reference_logits, axis=-1)
    log_q = jax.nn.log_softmax(logits, axis=-1)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # Where p is zero the logarithms may be -inf and their difference not a number; p d is zero.
    d = jnp.where(p > 0, log_p, 0.0) - jnp.where(p > 0, log_q, 0.0)
    small = jnp.abs(d) < 1
    near = p * (d + jnp.expm1(-jnp.where(small, d, 0.0)))
    return jnp.sum(jnp.where(small & (p > 0), near, p * d + (q - p)), axis=-1)


def _over_chunks(rows: Callable[..., Any], arrays: tuple[Array, ...], chunk_tokens: int) -> Any:
    """Applies `rows`, [M, ...] arrays to a tree of [M, ...], to [B, T, ...] arrays."""
    if chunk_tokens < 0:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be 0 (one chunk) or positive")
    batch, length = arrays[0].shape[:2]
    # A chunk is a span of positions of all sequences: a batch sharded over devices stays sharded.
    span = length if chunk_tokens == 0 else min(length, max(1, chunk_tokens // batch))

    def chunk(arrays):
        out = rows(*(a.reshape(-1, *a.shape[2:]) for a in arrays))
        return jax.tree.map(lambda a: a.reshape(batch, span, *a.shape[1:]), out)

    if span == length:
        return chunk(arrays)
    num_chunks = -(-length // span)
    out = jax.lax.map(jax.checkpoint(chunk), tuple(_split(a, num_chunks, span) for a in arrays))
    return jax.tree.map(lambda a: _join(a, length), out)


def _split(array: Array, num_chunks: int, span: int) -> Array:
    """[B, T, ...] to [chunks, B, span, ...], the last position repeated to fill the last chunk."""
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, num_chunks * span - array.shape[1])
    # Real values again, not zeros: every head is finite there, so the unused gradient is zero.
    padded = jnp.pad(array, padding, mode="edge")
    return jnp.moveaxis(padded.reshape(array.shape[0], num_chunks, span, *array.shape[2:]), 1, 0)


def _join(chunks: Array, length: int) -> Array:
    """[chunks, B, span, ...] back to [B, T, ...]."""
    num_chunks, batch, span = chunks.shape[:3]
    joined = jnp.moveaxis(chunks, 0, 1).reshape(batch, num_chunks * span, *chunks.shape[3:])
    return joined[:, :length]
