"""Records, recoveries and sentences of a comparison with invented scores."""

import json

import numpy as np
import pytest

from gemmaqat.evaluation import results as results_module
from gemmaqat.evaluation.findings import findings
from gemmaqat.evaluation.results import (
    kl_against,
    make_records,
    over_seeds,
    recovery_text,
    results,
)


@pytest.fixture(scope="module")
def found(tmp_path_factory, fabricated):
    workdir = tmp_path_factory.mktemp("comparison")
    fabricated.write(workdir, sizes=("tiny_a", "tiny_b"), seeds=(0, 1))
    return results(workdir)


def make_records_of(fabricated, scores):
    return make_records(scores, tables=fabricated.make_tables(), bootstrap_samples=200)


def test_one_record_per_size_recipe_arm_and_seed(found, fabricated):
    keys = [results_module.key_of(record) for record in found.records]
    assert len(keys) == len(set(keys)) == 2 * 2 * len(fabricated.INVENTED)
    assert all(np.isfinite(list(record["metrics"].values())).all() for record in found.records)


@pytest.mark.parametrize("recipe, arm", [("severe", "qat"), ("severe", "control"), ("mild", "qat")])
def test_recovery_and_matched_recovery_are_their_formulas(found, recipe, arm):
    base, continued, ptq, control, own = (
        found.record("tiny_a", r, a, 0)["metrics"]["answer_perplexity"]
        for r, a in (("none", "float"), ("none", "continued"), (recipe, "ptq"),
                     (recipe, "control"), (recipe, arm))
    )  # fmt: skip
    metrics = found.record("tiny_a", recipe, arm, 0)["metrics"]
    assert metrics["recovery"] == pytest.approx((ptq - own) / (ptq - base))
    if arm == "qat":
        matched = (control - own) / (control - continued)
        assert metrics["matched_recovery"] == pytest.approx(matched)


def test_kl_recovery_compares_the_kl_to_the_base(found):
    metrics = found.record("tiny_a", "mild", "distill", 0)["metrics"]
    assert metrics["kl_recovery"] == pytest.approx(1 - 0.0055 / 0.017)


def test_matched_kl_recovery_is_to_the_float_model_that_trained_on(found):
    metrics = found.record("tiny_a", "mild", "qat", 0)["metrics"]
    assert metrics["matched_kl_recovery"] == pytest.approx(1 - 0.004 / 0.016)
    # The plain one blames quantization for what training on does to a float model, too.
    assert metrics["kl_recovery"] < 0


@pytest.mark.parametrize(
    "arm, reference",
    [("ptq", "base"), ("distill", "base"), ("control", "continued"), ("qat", "continued")],
)
def test_kl_to_the_own_float_is_to_the_model_an_arm_should_equal(found, arm, reference):
    record = found.record("tiny_a", "mild", arm, 0)
    tokens = 30.0 * 64
    folder = results_module.arm_folder(found.workdir, "tiny_a", "mild", arm, 0)
    sums = results_module.Scores.load(folder / "evaluation").sums(f"kl_to_{reference}")
    assert record["metrics"]["answer_kl_to_own"] == pytest.approx(sums.total.sum() / tokens)
    low, high = record["intervals"]["answer_kl_to_own"]
    assert low < record["metrics"]["answer_kl_to_own"] < high


def test_bits_of_quantized_weights_leave_the_float_ones_out(found):
    metrics = found.record("tiny_a", "severe", "qat", 0)["metrics"]
    assert metrics["quantized_share"] == 0.5
    assert metrics["quantized_bits_per_weight"] == 2 + 32 / 64  # one float32 scale per 64 codes
    assert "quantized_share" not in found.record("tiny_a", "none", "float", 0)["metrics"]


def test_distilled_arm_gets_no_matched_recovery(found):
    record = found.record("tiny_a", "severe", "distill", 0)
    assert "matched_recovery" not in record["metrics"] | record["notes"]


def test_a_damage_within_noise_gives_a_note_and_no_number(fabricated):
    scores = fabricated.invent()
    key = ("tiny_a", "mild", "ptq", 0)
    scores[key] = fabricated.make_scores(0.0005, 0.01, seed=0, noise=0.2)
    records = {r["recipe"] + r["arm"]: r for r in make_records_of(fabricated, scores)}
    for arm in ("control", "qat", "distill"):
        record = records[f"mild{arm}"]
        assert "recovery" not in record["metrics"] | record["intervals"]
        assert recovery_text(record, "recovery") == "PTQ damage within noise"
    assert "recovery" in records["severeqat"]["metrics"]
    mild = next(s for s in findings(records.values()) if ", mild" in s)
    assert "within noise" in mild and "No recovery of perplexity is given" in mild


def test_sentences_send_the_reader_on_where_the_control_alone_recovers_much(found):
    single = [r for r in found.records if (r["size"], r["seed"]) == ("tiny_a", 0)]
    _, mild, severe = findings(single)
    assert mild.startswith("tiny_a, mild: ") and severe.startswith("tiny_a, severe: ")
    assert "explains much of that" in mild and "read the matched recovery" in mild
    assert "read the matched recovery" not in severe and "control" in severe


def test_a_control_whose_interval_reaches_lower_only_may_explain(fabricated):
    scores = fabricated.invent()
    for arm, nll in (("ptq", 0.2), ("control", 0.12)):
        key = ("tiny_a", "mild", arm, 0)
        scores[key] = fabricated.make_scores(nll, 0.1, seed=0, noise=0.4)
    records = make_records_of(fabricated, scores)
    control = next(r for r in records if (r["recipe"], r["arm"]) == ("mild", "control"))
    assert control["metrics"]["recovery"] > 0.2 > control["intervals"]["recovery"][0]
    mild = next(s for s in findings(records) if ", mild" in s)
    alone = recovery_text(control, "recovery")
    assert f"may explain part of that ({alone})" in mild and "explains much" not in mild


def test_kl_sentences_hold_each_arm_to_its_own_float(found):
    single = [r for r in found.records if (r["size"], r["seed"]) == ("tiny_a", 0)]
    drift, mild, _ = findings(single)
    assert drift.startswith("tiny_a: ") and "KL of 0.02" in drift and "(drift)" in drift
    assert "KL to the own float model: QAT 75 % [75, 75], distilled QAT 68 % [68, 68]" in mild


def test_sentences_speak_of_all_seeds_at_once(found):
    sentences = findings(found.records)
    assert len(sentences) == 2 * (1 + 2)
    assert all("mean over seeds" in sentence for sentence in sentences)


def test_seeds_are_averaged_with_their_range(found, fabricated):
    averaged = over_seeds(found.records)
    assert len(averaged) == 2 * len(fabricated.INVENTED)
    own = next(
        r for r in averaged if (r["size"], r["recipe"], r["arm"]) == ("tiny_a", "mild", "ptq")
    )
    single = [
        found.record("tiny_a", "mild", "ptq", s)["metrics"]["answer_perplexity"] for s in (0, 1)
    ]
    assert own["metrics"]["answer_perplexity"] == pytest.approx(np.mean(single))
    assert own["intervals"]["answer_perplexity"] == sorted(single)
    assert over_seeds(r for r in found.records if r["seed"] == 0) == []


@pytest.mark.parametrize("arm", ["ptq", "qat"])
def test_recipes_are_held_against_each_other_by_the_kl_to_the_own_float(found, arm):
    mild, severe = (
        found.record("tiny_a", recipe, arm, 0)["metrics"]["answer_kl_to_own"]
        for recipe in ("mild", "severe")
    )
    difference, ratio = kl_against(found, "mild", "severe", size="tiny_a", arm=arm)
    assert difference.value == pytest.approx(mild - severe)
    assert ratio.value == pytest.approx(mild / severe)
    assert difference.low <= difference.value <= difference.high
    same, one = kl_against(found, "mild", "mild", size="tiny_a", arm=arm)
    # The same sequences on both sides: where nothing differs there is no spread either.
    assert (same.low, same.high, one.low, one.high) == (0, 0, 1, 1)


def test_curves_and_layer_errors_are_read_per_arm(found):
    assert ("tiny_a", "none", "float", 0) in found.curves
    assert ("tiny_a", "mild", "ptq", 0) not in found.curves
    row = found.layer_errors[0]
    assert row.keys() == {"size", "recipe", "arm", "seed", "layer", "error"}


def test_a_directory_without_results_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="finished `gemmaqat compare`"):
        results(tmp_path)


@pytest.mark.parametrize("version", [1, 99])
def test_a_summary_of_another_version_is_refused(version, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"format_version": version}))
    with pytest.raises(ValueError, match=f"format_version is {version}.*trains nothing twice"):
        results(tmp_path)
