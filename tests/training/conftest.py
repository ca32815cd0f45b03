"""One small Gemma, its programs compiled once for all tests of training, and experiments for it."""

import dataclasses

import pytest
from flax import nnx

from gemmaqat import config as configs
from gemmaqat.models.config import FULL
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.rules import resolve
from gemmaqat.training.loop import fit
from gemmaqat.training.step import make_programs


def small_experiment(**sections):
    """Eight steps of four short rows; keyword arguments replace fields, section by section."""
    config = configs.base("e2b_mini")
    config.data.update(sequence_length=64, batch_size=4)
    config.train.update(method="qat", num_steps=8, log_every=1, eval_sequences=0)
    config.optimizer.update(warmup_steps=2, learning_rate=3e-3, weight_decay=0.1)
    config.checkpoint.update(every_steps=3, keep_last=2)
    for section, fields in sections.items():
        config[section].update(fields)
    return configs.parse(config)


@pytest.fixture(scope="session")
def experiment():
    return small_experiment


@pytest.fixture(scope="session")
def model():
    config = model_config(
        "e2b_mini", layer_types=(FULL,), num_kv_shared_layers=0, per_layer_dim=0, mlp_dim=64
    )
    return Gemma4(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def table(model):
    return resolve("int2_channel", model)


@pytest.fixture(scope="session")
def programs(model):
    sections = small_experiment()
    return make_programs(nnx.split(model)[0], sections.train, sections.optimizer)


@pytest.fixture(scope="session")
def run(model, table, programs):
    """`fit` of the small model with the shared programs; keyword arguments go to it."""

    def run(workdir, experiment, **options):
        options = dict(model=model, table=table, method="qat", programs=programs) | options
        options = {name: value for name, value in options.items() if value is not ...}
        return fit(experiment=experiment, workdir=workdir, **options)

    return run


@pytest.fixture(scope="session")
def replaced():
    """`dataclasses.replace` on one section of an experiment."""

    def replace(experiment, section, **fields):
        changed = dataclasses.replace(getattr(experiment, section), **fields)
        return dataclasses.replace(experiment, **{section: changed})

    return replace
