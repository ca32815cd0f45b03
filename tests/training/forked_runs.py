"""Starts a training run in a fresh process as often as asked, without importing everything anew.

Run as a script by kill_test: for every line `WORKDIR RESULT` on standard input it forks a process
that trains in WORKDIR until the end and writes the parameters' hash to RESULT, prints the
process's id, waits for its end, and prints its status (negative: the signal that ended it).
JAX starts only in the forked processes.
"""

import os
import sys
import traceback
from pathlib import Path

import jax
from flax import nnx

from gemmaqat import config as configs
from gemmaqat.models.config import FULL
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.rules import resolve
from gemmaqat.training.loop import fit
from gemmaqat.training.trees import hash_params


def experiment(num_steps):
    """A save after every step, so that most kills meet one; every feature that has state."""
    config = configs.base("e2b_mini")
    config.data.update(sequence_length=64, batch_size=4)
    config.train.update(
        method="qat", num_steps=num_steps, start_step=num_steps // 3, accumulation_steps=2,
        log_every=1, eval_every=7, eval_sequences=4,
    )  # fmt: skip
    config.optimizer.update(warmup_steps=5, weight_decay=0.1)
    config.checkpoint.update(every_steps=1, keep_last=2, keep_best=1)
    return configs.parse(config)


def run(workdir, num_steps):
    config = model_config(
        "e2b_mini", layer_types=(FULL,), num_kv_shared_layers=0, per_layer_dim=0, mlp_dim=64
    )
    model = Gemma4(config, rngs=nnx.Rngs(0))
    return fit(
        model=model,
        table=resolve("int2_channel", model),
        method="qat",
        experiment=experiment(num_steps),
        workdir=workdir,
    )


def main(num_steps, cache):
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    for line in sys.stdin:
        workdir, result = line.split()
        child = os.fork()
        if child == 0:
            try:
                Path(result).write_text(hash_params(run(workdir, num_steps).params))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
