"""Runs with quantized activations: calibrated once, fixed or learned, saved and read back."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.models.config import FULL, SLIDING
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.activations import (
    activation_scales,
    prepare,
    with_scales,
    without_activations,
)
from gemmaqat.quantization.rules import resolve
from gemmaqat.quantization.table import ON
from gemmaqat.training.calibration import calibrated
from gemmaqat.training.checkpoint import best_step
from gemmaqat.training.loop import fit
from gemmaqat.training.optimizer import is_decayed
from gemmaqat.training.start import load_run
from gemmaqat.training.step import make_programs
from gemmaqat.training.trees import flatten, hash_params

RECIPE = "mobile_e2b_mini"
SILENT = 127  # a byte that the tasks never write


@pytest.fixture(scope="module")
def plain():
    config = model_config(
        "e2b_mini", layer_types=(SLIDING, FULL), num_kv_shared_layers=0, mlp_dim=64
    )
    return Gemma4(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def table(plain):
    return resolve(RECIPE, plain)


@pytest.fixture(scope="module")
def model(plain, table):
    return prepare(plain, table)


@pytest.fixture(scope="module")
def settings(experiment):
    return experiment(
        train=dict(num_steps=3), checkpoint=dict(every_steps=0), quantization=dict(recipe=RECIPE)
    )


@pytest.fixture(scope="module")
def shared(model, settings):
    return make_programs(nnx.split(model)[0], settings.train, settings.optimizer)


@pytest.fixture(scope="module")
def train(model, table, settings, shared, tmp_path_factory):
    """`fit` with the shared programs: (result, work directory); keyword arguments go to it."""

    def train(experiment=settings, **options):
        workdir = tmp_path_factory.mktemp("run")
        given = dict(model=model, table=table, method="qat", programs=shared) | options
        return fit(experiment=experiment, workdir=workdir, **given), workdir

    return train


@pytest.fixture(scope="module")
def finished(train):
    return train()


def values(params):
    return {path: float(scale) for path, scale in activation_scales(params).items()}


def test_scales_are_those_of_round_to_nearest_and_stay_fixed(finished, model, table, settings):
    graphdef, start = nnx.split(model)
    expected = values(calibrated(graphdef, start, table, settings))
    assert values(finished[0].params) == expected and min(expected.values()) > 0
    moved = finished[0].params["layers"][0]["mlp"]["up_proj"]["weight"].get_value()
    assert jnp.any(moved != model.layers[0].mlp.up_proj.weight.get_value())


def test_a_scale_that_is_there_is_kept(model, table, settings):
    path = "layers/0/mlp/input/scale"
    graphdef, start = nnx.split(with_scales(model, {path: 0.123}))
    found = values(calibrated(graphdef, start, table, settings))
    assert found[path] == np.float32(0.123) and min(found.values()) > 0


def test_learned_scales_move_by_small_factors_and_stay_positive(train, finished, settings):
    quantization = dataclasses.replace(settings.quantization, learn_activation_scales=True)
    found = values(train(dataclasses.replace(settings, quantization=quantization))[0].params)
    factors = np.array([found[path] / scale for path, scale in values(finished[0].params).items()])
    assert np.all(factors > 0) and np.mean(factors != 1) > 0.9
    # Adam's step is about one learning rate, 3e-3 at most, in the logarithm of every scale.
    assert np.all(np.abs(np.log(factors)) < 4 * 3 * 3e-3)


def test_float_training_on_the_prepared_model_is_float_training(train, plain, settings):
    prepared = train(table=None, method="none")[0].params
    alone = train(model=plain, table=None, method="none", programs=None)[0].params
    assert set(values(prepared).values()) == {0.0}
    expected = flatten(alone)
    for path, leaf in flatten(prepared).items():
        if path in expected:  # the same program but for the hooks: other fusions, other last bits
            np.testing.assert_allclose(leaf, expected[path], atol=2e-5, err_msg=path)


def test_before_the_start_step_activations_are_float(train, settings, table):
    late = dataclasses.replace(settings, train=dataclasses.replace(settings.train, start_step=2))
    early = dataclasses.replace(settings, train=dataclasses.replace(settings.train, num_steps=2))
    in_float = train(early, table=None, method="none")[0].params
    found = train(late)[0].params
    graphdef = nnx.split(prepare(load(in_float), table))[0]
    assert values(found) == values(calibrated(graphdef, in_float, table, late))


def load(params):
    config = model_config(
        "e2b_mini", layer_types=(SLIDING, FULL), num_kv_shared_layers=0, mlp_dim=64
    )
    return Gemma4(config, rngs=None)


def test_the_default_teacher_is_the_float_model(train, model, settings):
    scales = dict.fromkeys(activation_scales(model), 0.05)
    result, workdir = train(model=with_scales(model, scales), method="distill")
    told = (workdir / "run.json").read_text()
    assert hash_params(nnx.split(without_activations(model))[1]) in told


def test_a_checkpoint_brings_the_scales_back(finished):
    run = load_run(finished[1])
    assert values(run.model) == values(finished[0].params)
    assert run.table.activations
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(1, 16)
    off = without_activations(run.model)
    assert jnp.any(run.model(tokens).logits != off(tokens).logits)


def test_rows_never_seen_stay_at_the_best_rounding(finished, model, table):
    """Weight decay included, which is 0.1 here."""
    path = "embed_tokens_per_layer/weight"
    before = flatten(nnx.split(model)[1])[path][SILENT]
    after = flatten(finished[0].params)[path]
    np.testing.assert_array_equal(after[SILENT], before)
    assert jnp.any(after != flatten(nnx.split(model)[1])[path])


def test_only_matrices_that_are_multiplied_decay(model):
    decayed = {path for path, flag in flatten(is_decayed(nnx.split(model)[1])).items() if flag}
    assert "layers/0/mlp/up_proj/weight" in decayed and "embed_tokens/weight" in decayed
    assert "embed_tokens_per_layer/weight" not in decayed
    assert not any(path.endswith(("norm/weight", "/scale")) for path in decayed)


def test_dynamic_inputs_are_trained_with_and_neither_calibrated_nor_learned(
    train, settings, monkeypatch
):
    plain = Gemma4(
        model_config("31b_mini", layer_types=(FULL,), mlp_dim=64, vocab_size=128), rngs=nnx.Rngs(0)
    )
    table = resolve("w8a8", plain)
    prepared = prepare(plain, table)
    graphdef, start = nnx.split(prepared)
    with monkeypatch.context() as patch:
        patch.delattr("gemmaqat.training.calibration.make_loader")  # no data is asked for
        on = calibrated(graphdef, start, table, settings)
    assert set(values(on).values()) == {ON}
    experiment = dataclasses.replace(
        settings,
        train=dataclasses.replace(settings.train, num_steps=2, start_step=0),
        quantization=dataclasses.replace(settings.quantization, learn_activation_scales=True),
    )
    options = dict(programs=make_programs(graphdef, experiment.train, experiment.optimizer))
    found = train(experiment, model=prepared, table=table, **options)[0].params
    assert set(values(found).values()) == {ON}
    weights_alone = dataclasses.replace(table, activations=())
    other = train(experiment, model=prepared, table=weights_alone, **options)[0].params
    assert jnp.any(flatten(found)["layers/0/mlp/up_proj/weight"]
                   != flatten(other)["layers/0/mlp/up_proj/weight"])  # fmt: skip


def test_the_gradient_program_is_compiled_once_for_float_and_quantized(finished, train, shared):
    train(table=None, method="none")
    assert shared.next_token._cache_size() == 1
    assert shared.update._cache_size() == 1


def test_scales_of_the_start_neither_clamp_nor_move_before_the_start_step(
    train, model, table, settings
):
    """As coarse as these, they would change every weight's first step."""
    scaled = with_scales(model, dict.fromkeys(activation_scales(model), 0.7))
    waiting = dataclasses.replace(settings.train, start_step=2, num_steps=2)
    found = train(dataclasses.replace(settings, train=waiting), model=scaled)[0].params
    assert set(values(found).values()) == {np.float32(0.7)}
    short = dataclasses.replace(settings.train, num_steps=2)
    in_float = train(dataclasses.replace(settings, train=short), table=None, method="none")[0]
    expected = flatten(in_float.params)
    for path, leaf in flatten(found).items():
        if not path.endswith("/scale"):
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_no_checkpoint_without_its_clamps_is_the_best(train, settings):
    experiment = dataclasses.replace(
        settings,
        train=dataclasses.replace(
            settings.train, start_step=1, num_steps=2, eval_every=1, eval_sequences=4
        ),
        checkpoint=dataclasses.replace(settings.checkpoint, keep_best=1, keep_last=2),
    )
    folder = train(experiment)[1] / "checkpoints"
    metrics = [json.loads(f.read_text())["metric"] for f in folder.glob("0*/checkpoint.json")]
    assert len(metrics) == 2 and metrics.count(None) == 1 and best_step(folder) == 2
