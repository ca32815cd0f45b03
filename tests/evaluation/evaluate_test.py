"""The evaluation program gives what a plain computation gives, for float and quantized models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat import config as configs
from gemmaqat.evaluation.evaluate import Evaluator, Scores
from gemmaqat.models.config import FULL, SLIDING
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve


@pytest.fixture(scope="module")
def experiment():
    config = configs.tiny(configs.base("31b_mini"))
    config.evaluation.update(num_sequences=6, batch_size=4, items_per_task=2)
    return configs.parse(config)


@pytest.fixture(scope="module")
def models():
    """A model and one with other parameters."""
    config = model_config("31b_mini", layer_types=(SLIDING, FULL), embed_dim=64, mlp_dim=64)
    return [Gemma4(config, rngs=nnx.Rngs(seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def table(models):
    return resolve("int4_channel", models[0])


@pytest.fixture(scope="module")
def judged(experiment, models, table):
    """Evaluator and the scores of the float model, its int4 form, and the other model."""
    (graphdef, params), (_, other) = (nnx.split(model) for model in models)
    # As they come from training: bound to a device. Fresh ones are not, and must not recompile.
    other = jax.device_put(other, jax.devices()[0])
    evaluator = Evaluator(graphdef, experiment, references=("base", "continued"))
    references = [evaluator.reference("base", params), evaluator.reference("continued", other)]
    scores = {
        "float": evaluator.score(params, references=references),
        "int4": evaluator.score(params, table, references=references),
        "other": evaluator.score(other, references=references),
    }
    return evaluator, scores


def dense(model, batch):
    """Log-probabilities [B, T, V] of the plain forward pass."""
    out = model(*(jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")))
    return jax.nn.log_softmax(out.logits, axis=-1)


def token_means(model, batches, reference):
    """Answer and all-token NLL, accuracy, KL and agreement, without any of our own code."""
    log_q = np.concatenate([dense(model, batch) for batch in batches]).astype(np.float64)
    log_p = np.concatenate([dense(reference, batch) for batch in batches]).astype(np.float64)
    targets = np.concatenate([batch["targets"] for batch in batches])
    weights = np.concatenate([batch["loss_weights"] for batch in batches])
    quantities = {
        "perplexity": -np.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0],
        "accuracy": np.argmax(log_q, axis=-1) == targets,
        "kl_to_continued": np.sum(np.exp(log_p) * (log_p - log_q), axis=-1),
        "agreement_with_continued": np.argmax(log_q, axis=-1) == np.argmax(log_p, axis=-1),
    }
    found = {}
    for name, mask in {"answer": weights == 1, "all": weights > 0}.items():
        for quantity, values in quantities.items():
            found[f"{name}_{quantity}"] = np.mean(values[mask])
        found[f"{name}_perplexity"] = np.exp(found[f"{name}_perplexity"])
    return found


def test_token_metrics_equal_the_plain_computation(judged, models):
    evaluator, scores = judged
    expected = token_means(models[0], evaluator.holdout, models[1])
    found = {name: scores["float"].metrics[name] for name in expected}
    # Float32 sums in another order; measured 2e-6.
    assert found == pytest.approx(expected, rel=8e-6)
    assert expected["answer_perplexity"] != pytest.approx(expected["all_perplexity"], rel=1e-3)


def test_quantized_scores_are_those_of_the_packed_model(judged, models, table):
    """What is judged is what ships: the model whose weights stay packed."""
    evaluator, scores = judged
    expected = token_means(convert(models[0], table), evaluator.holdout, models[1])
    found = {name: scores["int4"].metrics[name] for name in expected}
    assert found == pytest.approx(expected, rel=2e-5)
    assert found["answer_perplexity"] != scores["float"].metrics["answer_perplexity"]


def test_a_model_agrees_wholly_with_itself(judged):
    _, scores = judged
    for arm, reference in (("float", "base"), ("other", "continued")):
        metrics = scores[arm].metrics
        assert metrics[f"answer_kl_to_{reference}"] == 0
        assert metrics[f"all_agreement_with_{reference}"] == 1
    assert scores["other"].metrics["answer_kl_to_base"] > 0.01


def test_all_models_share_one_compiled_program(judged):
    evaluator, _ = judged
    assert evaluator._program._cache_size() == 1


def test_rows_that_only_fill_a_batch_are_left_out(judged, experiment):
    evaluator, scores = judged
    assert sum(len(batch["tokens"]) for batch in evaluator.holdout) == 8
    assert len(scores["float"].sequences["all_nll"]) == experiment.evaluation.num_sequences


def test_bytes_are_those_of_the_table_and_errors_those_of_its_weights(judged, table):
    _, scores = judged
    metrics = scores["int4"].metrics
    assert metrics["bytes"] == table.num_bytes
    assert metrics["bits_per_weight"] == pytest.approx(table.bits_per_weight())
    assert scores["float"].metrics["bits_per_weight"] == 32
    paths = {entry.path.removesuffix("/weight") for entry in table.quantized}
    assert scores["int4"].layer_errors.keys() == paths and paths
    # Int4 per channel on normal weights, scale absmax / 7: step 0.38 sigma, error a twelfth's root.
    assert all(0.08 < error < 0.14 for error in scores["int4"].layer_errors.values())
    assert scores["float"].layer_errors == {}


def test_every_task_gets_its_items(judged, experiment):
    _, scores = judged
    names = {name for name in scores["float"].metrics if name.startswith("task/")}
    assert len(names) == 7
    assert len(scores["float"].matches) == 7 * experiment.evaluation.items_per_task


def test_scores_come_back_from_their_files(judged, tmp_path):
    _, scores = judged
    scores["int4"].save(tmp_path / "evaluation")
    found = Scores.load(tmp_path / "evaluation")
    for field in dataclasses.fields(Scores):
        mine, theirs = getattr(scores["int4"], field.name), getattr(found, field.name)
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_an_unfinished_evaluation_is_no_evaluation(judged, tmp_path):
    _, scores = judged
    scores["float"].save(tmp_path)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished evaluation"):
        Scores.load(tmp_path)


def test_a_newer_format_is_refused(judged, tmp_path):
    _, scores = judged
    scores["float"].save(tmp_path)
    path = tmp_path / "metrics.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format_version is 2"):
        Scores.load(tmp_path)
