"""Configs: what cannot be meant is refused by name before anything runs."""

import re

import pytest

from gemmaqat import config as configs


@pytest.mark.parametrize(
    "field, value",
    [
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", float("nan")),
        ("compare.base_learning_rate", -1e-3),
        ("compare.arm_learning_rate", float("inf")),
        ("optimizer.warmup_steps", -1),
        ("compare.base_steps", -1),
        ("compare.arm_warmup_steps", -1),
        ("train.loss_chunk_tokens", -1),
        ("train.eval_sequences", -1),
        ("checkpoint.keep_best", -1),
        ("evaluation.items_per_task", -1),
        ("evaluation.bootstrap_samples", 0),
        ("quantization.calibration_batches", 0),
        ("quantization.calibration_method", "percentile"),
        ("compare.sizes", ()),
        ("compare.recipes", ()),
        ("compare.seeds", ()),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    config = configs.base()
    section, _, name = field.partition(".")
    config[section][name] = value
    with pytest.raises(ValueError, match=rf"^config\.{re.escape(field)}: "):
        configs.parse(config)


@pytest.mark.parametrize("without", ["eval_every", "eval_sequences"])
def test_the_best_checkpoint_needs_a_loss_to_be_best_by(without):
    config = configs.base()
    config.checkpoint.keep_best = 1
    config.train.update({"eval_every": 5, "eval_sequences": 4, without: 0})
    with pytest.raises(ValueError, match=r"^config\.checkpoint\.keep_best: needs hold-out losses"):
        configs.parse(config)


@pytest.mark.parametrize("size", ["e2b_mini", "e2b"])
def test_the_defaults_pass(size):
    configs.parse(configs.base(size))


def test_tiny_takes_the_recipes_of_the_miniature_everywhere():
    config = configs.base("e2b")
    config.quantization.recipe = "mobile_e2b"
    config.compare.recipes = ("int4_channel", "mobile_e2b")
    small = configs.tiny(config)
    assert small.quantization.recipe == "mobile_e2b_mini"
    assert tuple(small.compare.recipes) == ("int4_channel", "mobile_e2b_mini")
