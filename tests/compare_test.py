"""A comparison gives every arm the same start, tokens and judge, and does nothing twice."""

import importlib
import json
import shutil

import numpy as np
import pytest

from gemmaqat import config as configs
from gemmaqat.compare import compare, evaluate
from gemmaqat.data.loader import make_loader
from gemmaqat.evaluation.results import NO_RECIPE, arm_folder
from gemmaqat.models import sizes
from gemmaqat.models.config import FULL, SLIDING
from gemmaqat.quantization.table import Table
from gemmaqat.training import workdir as workdirs

# The package's own name `compare` is the function.
compare_module = importlib.import_module("gemmaqat.compare")

SIZE, RECIPE = "31b_mini", "int2_channel"
TRAINED = {("continued", NO_RECIPE), ("qat", RECIPE), ("distill", RECIPE)}


@pytest.fixture(scope="module")
def config():
    config = configs.tiny(configs.base(SIZE))
    config.compare.recipes = (RECIPE,)
    return configs.parse(config)


@pytest.fixture(scope="module", autouse=True)
def two_layers():
    """The size in question with two layers: everything compiles in half the time."""
    small = {**sizes._SIZES[SIZE], "layer_types": (SLIDING, FULL), "embed_dim": 64, "mlp_dim": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sizes._SIZES, SIZE, small)
        yield


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A finished comparison: its work directory, result, programs, evaluators and fits."""
    workdir = tmp_path_factory.mktemp("comparison")
    made = {"make_programs": [], "Evaluator": [], "fit": []}

    def spy(name):
        function = getattr(compare_module, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            made[name].append((kwargs, result))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in made:
            patch.setattr(compare_module, name, spy(name))
        result = compare(config, workdir)
    return workdir, result, made


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished work directory that a test may damage."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_every_arm_has_a_record(finished):
    arms = [(r["recipe"], r["arm"]) for r in finished[1].results.records]
    assert arms == [
        (NO_RECIPE, "float"), (NO_RECIPE, "continued"), (RECIPE, "ptq"), (RECIPE, "control"),
        (RECIPE, "qat"), (RECIPE, "distill"),
    ]  # fmt: skip


def test_a_comparison_keeps_other_processes_out(config, tmp_path):
    with workdirs.lock(tmp_path), pytest.raises(ValueError, match="another process is working"):
        compare(config, tmp_path)


def test_everything_compiles_once(finished):
    """One program per loss, one for evaluation, one small map per table."""
    _, _, made = finished
    ((_, programs),), ((_, evaluator),) = made["make_programs"], made["Evaluator"]
    assert programs.next_token._cache_size() == 1
    assert programs.kl._cache_size() == 1
    assert evaluator._program._cache_size() == 1
    assert [m.forward._cache_size() for m in programs._maps.values()] == [1]


def test_arms_start_from_the_base_and_differ_in_nothing_but_method_and_table(finished):
    workdir, _, made = finished
    base, *arms = made["fit"]
    assert len(arms) == len(TRAINED)
    for given, _ in arms:
        assert given["initial_params"] is base[1].params
    told = {}
    for arm, recipe in TRAINED:
        folder = arm_folder(workdir, SIZE, recipe, arm, 0)
        told[arm] = json.loads((folder / "config.json").read_text())
        del told[arm]["train"]["method"], told[arm]["quantization"]["recipe"]
    assert told["continued"] == told["qat"] == told["distill"]


def test_arms_see_the_same_tokens_and_none_of_the_base(finished):
    _, _, made = finished
    first = {}
    for given, _ in made["fit"]:
        experiment = given["experiment"]
        loader = make_loader(experiment.data, seed=experiment.seed)
        first[given["name"]] = next(loader)["tokens"]
    base, *arms = first.values()
    for tokens in arms:
        np.testing.assert_array_equal(tokens, arms[0])
    assert not np.array_equal(base, arms[0])


def test_only_the_distilled_arm_has_a_teacher_and_it_is_the_base(finished):
    _, _, made = finished
    base = made["fit"][0][1].params
    teachers = {given["method"]: given["teacher"] for given, _ in made["fit"]}
    assert teachers == {"none": None, "qat": None, "distill": base} or teachers["distill"] is base
    assert teachers["none"] is None and teachers["qat"] is None


def test_ptq_and_control_are_roundings_of_base_and_continued(finished):
    """Their perplexities are those of packing these two float models, nothing trained."""
    workdir, _, made = finished
    evaluator, table = made["Evaluator"][0][1], made["fit"][-1][0]["table"]
    params = {given["name"].split("/")[2]: result.params for given, result in made["fit"]}
    references = [
        evaluator.reference("base", params["float"]),
        evaluator.reference("continued", params["continued"]),
    ]
    records = {r["arm"]: r["metrics"] for r in finished[1].results.records}
    for arm, source in (("ptq", "float"), ("control", "continued"), ("qat", "qat")):
        scores = evaluator.score(params[source], table, references=references)
        assert scores.metrics["answer_perplexity"] == records[arm]["answer_perplexity"]


def test_a_finished_comparison_is_read_not_repeated(finished, config, monkeypatch):
    workdir, result, _ = finished
    for name in ("fit", "Evaluator", "make_programs", "initial_model"):
        monkeypatch.setattr(compare_module, name, None)
    assert compare(config, workdir).results.records == result.results.records


def test_a_lost_arm_alone_is_done_again_with_the_same_result(finished, config, copied):
    shutil.rmtree(arm_folder(copied, SIZE, RECIPE, "qat", 0))
    kept = arm_folder(copied, SIZE, RECIPE, "distill", 0) / "evaluation" / "metrics.json"
    written = kept.stat().st_mtime_ns
    assert compare(config, copied).results.records == finished[1].results.records
    assert kept.stat().st_mtime_ns == written


def test_another_config_is_refused_and_nothing_touched(config, copied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    other = configs.tiny(configs.base(SIZE))
    with pytest.raises(ValueError, match="compare.recipes.*int4_channel"):
        compare(other, copied)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


@pytest.mark.parametrize(
    "recipe, message", [("int2_chanel", "int2_channel"), ("none", "float arms")]
)
def test_a_bad_recipe_is_refused_before_anything_is_made(recipe, message, tmp_path):
    bad = configs.tiny(configs.base(SIZE))
    bad.compare.recipes = (recipe,)
    with pytest.raises(ValueError, match=message):
        compare(bad, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"train.start_step": 2, "train.num_steps": 9},
            "start_step: 2 is not below compare.arm_steps=2",
        ),
        ({"compare.base_steps": 0}, "compare.base_steps: 0 while model.checkpoint is empty"),
        (
            {"model.checkpoint": "a", "compare.sizes": (SIZE, "12b_mini")},
            "compare.sizes.*checkpoint names one model",
        ),
        ({"evaluation.kv_caches": ("int8",)}, "evaluation.kv_caches.* run `gemmaqat evaluate`"),
    ],
    ids=["start_step", "random base", "two sizes", "kv caches"],
)
def test_settings_that_make_no_comparison_are_refused(changes, message, tmp_path):
    bad = configs.tiny(configs.base(SIZE))
    bad.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        compare(bad, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_under_another_sizes_name_is_refused(finished, tmp_path):
    bad = configs.tiny(configs.base("12b_mini"))
    bad.model.checkpoint = str(arm_folder(finished[0], SIZE, NO_RECIPE, "float", 0))
    with pytest.raises(ValueError, match="not a 12b_mini, it has mlp_dim=64 for 256"):
        compare(bad, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", [compare, evaluate])
def test_a_vocabulary_beyond_the_models_is_refused(verb, finished, tmp_path):
    bad = configs.tiny(configs.base(SIZE))
    bad.model.checkpoint = str(arm_folder(finished[0], SIZE, NO_RECIPE, "float", 0))
    bad.data.tokenizer = "bytes-256"
    with pytest.raises(ValueError, match="ids up to 255, the model's vocabulary ends at 127"):
        verb(bad, tmp_path / "new")


def test_a_checkpoint_of_the_size_named_passes(finished, monkeypatch, tmp_path):
    """Up to the first training, which is not of interest here."""
    good = configs.tiny(configs.base(SIZE))
    good.model.checkpoint = str(arm_folder(finished[0], SIZE, NO_RECIPE, "float", 0))
    good.compare.base_steps = 0

    class Reached(Exception):
        pass

    def stop_here(*_):
        raise Reached

    monkeypatch.setattr(compare_module._Contest, "_run", stop_here)
    with pytest.raises(Reached):
        compare(good, tmp_path / "new")


def test_bits_are_those_of_the_table_that_was_trained(finished):
    workdir, result, _ = finished
    folder = arm_folder(workdir, SIZE, RECIPE, "qat", 0)
    table = Table.from_json(json.loads((folder / "quantization.json").read_text()))
    record = next(r for r in result.results.records if r["arm"] == "ptq")
    expected = table.bits_per_weight(quantized_only=True)
    assert record["metrics"]["quantized_bits_per_weight"] == expected < 4
    assert not (workdir / "quantization.json").exists()  # a comparison has no table of its own


def test_work_directory_holds_what_it_promises(finished):
    workdir, result, _ = finished
    for name in ("config.json", "run.json", "summary.json", "report.md", "report.html"):
        assert (workdir / name).stat().st_size > 0
    assert str(result) == result.table and "QAT" in result.table


def test_evaluate_judges_a_trained_work_directory_with_its_own_table(finished, copied, config):
    folder = arm_folder(copied, SIZE, RECIPE, "qat", 0)
    found = evaluate(config, folder)
    record = next(r for r in finished[1].results.records if r["arm"] == "qat")
    assert list(found) == ["float", RECIPE]
    for name in ("answer_perplexity", "task_mean", "bytes", "bits_per_weight"):
        assert found[RECIPE].metrics[name] == record["metrics"][name]
    assert (folder / "evaluation" / RECIPE / "metrics.json").is_file()


def test_evaluate_says_that_there_is_no_model(config, tmp_path):
    with pytest.raises(ValueError, match="no trained model there"):
        evaluate(config, tmp_path)
