"""The two training losses, from hidden states in chunks of positions.

Both are sums over tokens of `loss weight x value`; the caller divides by the total weight of the
optimizer step, so that a step of several micro-batches equals one step of the whole batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemmaqat.evaluation.metrics import token_kl, token_nll


def next_token_loss(model: Any, batch: dict[str, Array], *, chunk_tokens: int) -> Float[Array, ""]:
    """Weighted sum of the negative log-likelihood of the targets, nats.

    Args:
        model: maps tokens, positions and segment ids to hidden states, and has a `head`.
        batch: `tokens`, `targets`, `positions`, `segment_ids` and `loss_weights`, each [B, T].
        chunk_tokens: most positions whose logits exist at once; 0 = all.
    """
    hidden = hidden_states(model, batch)
    nll = token_nll(model.head, hidden, batch["targets"], chunk_tokens=chunk_tokens)
    return jnp.sum(nll * batch["loss_weights"])


def kl_loss(
    model: Any, teacher: Any, batch: dict[str, Array], *, chunk_tokens: int
) -> Float[Array, ""]:
    """Weighted sum of KL(teacher || model) over next-token distributions, nats.

    The teacher is a constant: no gradient reaches it. Arguments as in `next_token_loss`.
    """
    teacher_hidden = jax.lax.stop_gradient(hidden_states(teacher, batch))
    kl = token_kl(
        model.head,
        hidden_states(model, batch),
        teacher.head,
        teacher_hidden,
        chunk_tokens=chunk_tokens,
    )
    return jnp.sum(kl * batch["loss_weights"])


def hidden_states(model: Any, batch: dict[str, Array]) -> Float[Array, "B T D"]:
    """The residual stream before the final norm, without logits."""
    return model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        logits="none",
    ).hidden
