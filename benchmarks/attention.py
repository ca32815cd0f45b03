"""Attention: `attend` against its plain definition, forward and backward, alternated.

    python benchmarks/attention.py

Prints the median of the ratios plain / attend (above 1: `attend` is faster) at sequence lengths
128 and 2,048 for a sliding and a full-attention layer of E2B's shape.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from gemmaqat.models.attention import attend, attend_plainly
from gemmaqat.models.cache import KeyValues, attention_mask

REPEATS = 9


def make(function, length: int, head_dim: int, window: int | None, batch: int):
    """A jitted gradient of attention over random queries and keys, and its arguments."""
    key = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(key[0], (batch, length, 8, head_dim))
    k, v = (jax.random.normal(key[i], (batch, length, 1, head_dim)) for i in (1, 2))
    positions = jnp.broadcast_to(jnp.arange(length)[None, :], (batch, length))

    def loss(q, k, v):
        keys = KeyValues(k, v, positions)
        mask = attention_mask(positions, keys, segment_ids=None, window=window)
        return jnp.sum(function(q, k, v, mask) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))), (q, k, v)


def seconds(program, args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - start


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, median of {REPEATS} ratios")
    for length, batch in ((128, 16), (2_048, 1)):
        for name, head_dim, window in (("sliding", 256, 512), ("full", 512, None)):
            pairs = [make(f, length, head_dim, window, batch) for f in (attend, attend_plainly)]
            for program, args in pairs:
                seconds(program, args)
            times = np.array([[seconds(*pair) for pair in pairs] for _ in range(REPEATS)])
            ratio = np.median(times[:, 1] / times[:, 0])
            print(
                f"T={length:5d} {name:8s} attend {np.median(times[:, 0]) * 1e3:8.1f} ms, "
                f"plain / attend {ratio:.2f}"
            )


if __name__ == "__main__":
    main()
