"""A recipe with activations through every command, beside one without: the clamp goes along."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat import config as configs
from gemmaqat import shipping
from gemmaqat.compare import compare
from gemmaqat.evaluation.results import NO_RECIPE, arm_folder
from gemmaqat.interop.packed_folder import load_packed
from gemmaqat.main import main
from gemmaqat.models import sizes
from gemmaqat.models.config import FULL, SLIDING
from gemmaqat.quantization.activations import activation_scales, without_activations
from gemmaqat.quantization.convert import convert
from gemmaqat.training.start import load_run

SIZE, MOBILE, PLAIN = "e2b_mini", "mobile_e2b_mini", "int4_channel"

# ml_collections loads config files by a method that Python means to remove.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def two_layers():
    """The size in question with two layers: everything compiles in half the time."""
    small = {**sizes._SIZES[SIZE], "layer_types": (SLIDING, FULL), "num_kv_shared_layers": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sizes._SIZES, SIZE, small)
        patch.setenv("GEMMAQAT_COMPILATION_CACHE", "off")
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of both recipes: its work directory and result."""
    config = configs.tiny(configs.base(SIZE))
    config.compare.recipes = (PLAIN, MOBILE)
    workdir = tmp_path_factory.mktemp("comparison")
    return workdir, compare(config, workdir)


@pytest.fixture(scope="module")
def arm(finished):
    """The work directory of the mobile QAT arm."""
    return arm_folder(finished[0], SIZE, MOBILE, "qat", 0)


@pytest.fixture(scope="module")
def packed(arm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "packed"
    assert main(["gemmaqat", "quantize", f"--checkpoint={arm}", f"--workdir={folder}"]) == 0
    return folder


def scales(params):
    return {path: float(scale) for path, scale in activation_scales(params).items()}


def test_records_of_clamped_arms_alone_tell_what_dropping_the_clamps_does(finished):
    for record in finished[1].results.records:
        told = {name for name in record["metrics"] if name.startswith("unclamped_")}
        assert bool(told) == (record["recipe"] == MOBILE), record["arm"]
        if told:
            assert {"unclamped_answer_perplexity", "unclamped_task_mean"} <= told
            low, high = record["intervals"]["unclamped_answer_perplexity_change"]
            assert low <= record["metrics"]["unclamped_answer_perplexity_change"] <= high
            assert (
                record["metrics"]["unclamped_all_perplexity"]
                != (record["metrics"]["all_perplexity"])
            )
    assert "clamps off" in finished[1].table
    assert "clamps off" in (finished[0] / "report.html").read_text()


def test_float_arms_and_recipes_without_activations_keep_every_scale_at_zero(finished):
    arms = [(NO_RECIPE, "float"), (NO_RECIPE, "continued"), (PLAIN, "qat"), (PLAIN, "distill")]
    for recipe, name in arms:
        run = load_run(arm_folder(finished[0], SIZE, recipe, name, 0))
        assert not activation_scales(run.model)  # its table has none, so they are not even read
    bytes_of = {(r["recipe"], r["arm"]): r["metrics"]["bytes"] for r in finished[1].results.records}
    float_size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.split(run.model)[1]))
    assert bytes_of[NO_RECIPE, "float"] == float_size


def test_stored_bytes_and_bits_are_those_of_the_table_scales_of_activations_included(finished, arm):
    table = load_run(arm).table
    (metrics,) = [r["metrics"] for r in finished[1].results.records
                  if (r["recipe"], r["arm"]) == (MOBILE, "qat")]  # fmt: skip
    assert table.activation_bytes == 4 * len(table.activations) > 0
    assert metrics["bytes"] == table.num_bytes
    assert metrics["bits_per_weight"] == pytest.approx(table.bits_per_weight(), rel=1e-12)


def test_all_clamped_arms_from_one_start_share_their_scales(finished):
    found = [
        scales(load_run(arm_folder(finished[0], SIZE, MOBILE, name, 0)).model)
        for name in ("qat", "distill")
    ]
    assert found[0] == found[1] and min(found[0].values()) > 0


def test_quantize_keeps_the_scales_and_the_packed_model_uses_them(arm, packed):
    run = load_run(arm)
    loaded = load_packed(packed)
    assert scales(loaded) == scales(run.model)
    tokens = jnp.arange(5, 25, dtype=jnp.int32).reshape(1, 20)
    expected = convert(run.model, run.table)(tokens).logits
    np.testing.assert_array_equal(loaded(tokens).logits, expected)


def test_quantize_calibrates_what_was_never_calibrated(finished, tmp_path):
    base = arm_folder(finished[0], SIZE, NO_RECIPE, "float", 0)
    config = tmp_path / "mobile.py"
    config.write_text(
        "from gemmaqat.config import base, tiny\n"
        "def get_config():\n"
        f"    config = tiny(base('{SIZE}'))\n"
        f"    config.quantization.recipe = '{MOBILE}'\n"
        "    return config\n"
    )
    folder = tmp_path / "packed"
    arguments = [f"--config={config}", f"--checkpoint={base}", f"--workdir={folder}"]
    assert main(["gemmaqat", "quantize", *arguments]) == 0
    assert min(scales(load_packed(folder)).values()) > 0


def test_evaluate_repeats_the_record_clamps_on_and_off(finished, arm, tmp_path, capsys):
    shutil.copytree(arm, tmp_path / "arm")
    assert main(["gemmaqat", "evaluate", f"--workdir={tmp_path / 'arm'}"]) == 0
    page = capsys.readouterr().out
    record = finished[1].results.record(SIZE, MOBILE, "qat", 0)
    for name in ("answer_perplexity", "unclamped_answer_perplexity"):
        row = next(line for line in page.splitlines() if re.match(rf"{name} ", line))
        assert float(row.split()[-1]) == pytest.approx(record["metrics"][name], rel=1e-5)


def test_a_run_saved_before_its_clamps_is_not_exported(arm, tmp_path, capsys):
    run = load_run(arm)
    off = dataclasses.replace(run, model=without_activations(run.model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipping, "load_run", lambda folder: off)
        arguments = [f"--checkpoint={arm}", "--format=gemma-mobile", f"--workdir={tmp_path / 'x'}"]
        assert main(["gemmaqat", "export", *arguments]) == 2
    assert "train on, or run `gemmaqat quantize`" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_static_cache_of_a_run_is_refused_with_the_way_to_one(arm, capsys):
    arguments = [f"--checkpoint={arm}", "--prompt=a", "--kv_cache=static"]
    assert main(["gemmaqat", "generate", *arguments]) == 2
    assert "give a folder that `gemmaqat quantize` made" in capsys.readouterr().err
