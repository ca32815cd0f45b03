"""Experts on this backend: the grouped product against three other forms, alternated.

    python benchmarks/experts.py

Forms, each forward and backward over rows sorted by expert: `ragged_matmul` (what the model uses),
`jax.lax.ragged_dot`, every row times every expert with a mask, and a gathered matrix per row.
Prints median milliseconds and the ratio to `ragged_matmul`.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from gemmaqat.kernels.ragged import ragged_matmul

REPEATS = 7


def masked(x, w, group_sizes):
    """All experts on all rows, then one is kept."""
    group = jnp.repeat(jnp.arange(w.shape[0]), group_sizes, total_repeat_length=x.shape[0])
    chosen = jax.nn.one_hot(group, w.shape[0], dtype=x.dtype)
    return jnp.einsum("mk,ekn,me->mn", x, w, chosen, optimize=[(0, 1), (0, 1)])


def gathered(x, w, group_sizes):
    """One copy of the expert's matrix per row."""
    group = jnp.repeat(jnp.arange(w.shape[0]), group_sizes, total_repeat_length=x.shape[0])
    return jnp.einsum("mk,mkn->mn", x, w[group])


FORMS = {
    "ragged_matmul": ragged_matmul,
    "lax.ragged_dot": jax.lax.ragged_dot,
    "masked": masked,
    "gathered": gathered,
}


def seconds(program, args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - start


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, medians of {REPEATS}")
    for rows, experts, k, n in ((4_096, 8, 64, 128), (1_024, 128, 128, 128)):
        sizes = np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts))
        keys = jax.random.split(jax.random.key(0))
        args = (jax.random.normal(keys[0], (rows, k)), jax.random.normal(keys[1], (experts, k, n)))
        programs = {
            name: jax.jit(
                jax.grad(
                    lambda x, w, f=form, s=sizes: jnp.sum(f(x, w, jnp.asarray(s)) ** 2), (0, 1)
                )
            )
            for name, form in FORMS.items()
        }
        for program in programs.values():
            seconds(program, args)
        times = np.array([[seconds(p, args) for p in programs.values()] for _ in range(REPEATS)])
        print(f"{rows} rows, {experts} experts of {k} x {n}")
        for i, name in enumerate(programs):
            ratio = np.median(times[:, i] / times[:, 0])
            print(f"  {name:15s} {np.median(times[:, i]) * 1e3:9.2f} ms   {ratio:6.1f}x")


if __name__ == "__main__":
    main()
