"""What quantization adds to a training step: QAT against float, alternated in one process.

    python benchmarks/qat_step.py
    python benchmarks/qat_step.py --size=e4b_mini --tokens=2048 --recipes=q4_0,int2_channel

Every step is the whole of it: the weight map, the gradient program, the pullback, the update; the
float step shares gradient program and update and has no map. Prints the median of the ratios of
neighbouring steps with their quartiles, versions and the machine's load. Aim: at most 1.10 at 512
tokens per step or more.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemmaqat import config as configs
from gemmaqat.data.loader import make_loader
from gemmaqat.quantization.rules import resolve
from gemmaqat.training.start import initial_model
from gemmaqat.training.step import make_programs, split_batch
from gemmaqat.training.workdir import versions

LENGTH = 128


class Arm:
    """Steps of one table on its own copy of the parameters."""

    def __init__(self, programs, params, table):
        self.programs, self.quantize = programs, programs.quantize_map(table)
        self.params = jax.tree.map(lambda p: jax.device_put(jnp.copy(p), p.sharding), params)
        self.state = programs.init(self.params)
        self.rate = jnp.float32(1e-4)

    def seconds(self, batch) -> float:
        """Wall time of one optimizer step, from arrays on the device to updated parameters."""
        start = time.perf_counter()
        weights, pullback = self.quantize.forward(self.params)
        grads, _ = self.programs.next_token(weights, batch)
        grads = self.quantize.backward(pullback, grads)
        self.params, self.state, _ = self.programs.update(self.params, self.state, grads, self.rate)
        jax.block_until_ready(self.params)
        return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="e2b_mini")
    parser.add_argument("--tokens", type=int, default=512, help="per optimizer step")
    parser.add_argument("--recipes", default="int4_channel,int2_channel,q4_0")
    parser.add_argument("--steps", type=int, default=60, help="measured pairs per recipe")
    options = parser.parse_args()

    config = configs.base(options.size)
    config.data.update(sequence_length=LENGTH, batch_size=options.tokens // LENGTH)
    experiment = configs.parse(config)
    model = initial_model(experiment)
    graphdef, params = nnx.split(model)
    programs = make_programs(graphdef, experiment.train, experiment.optimizer)
    batch = jax.device_put(split_batch(next(make_loader(experiment.data, seed=0)), 1))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))

    print(" ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{options.size}: {count:,} parameters, {options.tokens} tokens per step")
    for recipe in options.recipes.split(","):
        table = resolve(recipe, model)
        float_, qat = Arm(programs, params, None), Arm(programs, params, table)
        for _ in range(3):  # compilation and first touches
            float_.seconds(batch), qat.seconds(batch)
        times = np.array(
            [(float_.seconds(batch), qat.seconds(batch)) for _ in range(options.steps)]
        )
        low, median, high = np.percentile(times[:, 1] / times[:, 0], (25, 50, 75))
        float_ms, qat_ms = 1e3 * np.median(times, axis=0)
        print(
            f"{recipe:14s} ratio {median:.3f} (quartiles {low:.3f} to {high:.3f}); "
            f"float {float_ms:.1f} ms, QAT {qat_ms:.1f} ms; load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()
