"""Records, recoveries and sentences of a comparison with invented scores."""

import json

import numpy as np
import pytest

from gemmaqat.evaluation import results as results_module
from gemmaqat.evaluation.results import findings, make_records, over_seeds, recovery_text, results


@pytest.fixture(scope="module")
def found(tmp_path_factory, fabricated):
    workdir = tmp_path_factory.mktemp("comparison")
    fabricated.write(workdir, sizes=("tiny_a", "tiny_b"), seeds=(0, 1))
    return results(workdir)


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


def test_distilled_arm_gets_no_matched_recovery(found):
    record = found.record("tiny_a", "severe", "distill", 0)
    assert "matched_recovery" not in record["metrics"] | record["notes"]


def test_a_damage_within_noise_gives_a_note_and_no_number(fabricated):
    scores = fabricated.invent()
    key = ("tiny_a", "mild", "ptq", 0)
    scores[key] = fabricated.make_scores(0.0005, 0.01, seed=0, noise=0.2)
    records = {r["recipe"] + r["arm"]: r for r in make_records(scores, bootstrap_samples=200)}
    for arm in ("control", "qat", "distill"):
        record = records[f"mild{arm}"]
        assert "recovery" not in record["metrics"] | record["intervals"]
        assert recovery_text(record, "recovery") == "PTQ damage within noise"
    assert "recovery" in records["severeqat"]["metrics"]
    mild = next(s for s in findings(records.values()) if "mild" in s)
    assert "within noise" in mild and "No recovery of perplexity is given" in mild


def test_sentences_send_the_reader_on_where_the_control_alone_recovers_much(found):
    single = [r for r in found.records if (r["size"], r["seed"]) == ("tiny_a", 0)]
    mild, severe = findings(single)
    assert mild.startswith("tiny_a, mild: ") and severe.startswith("tiny_a, severe: ")
    assert "read the matched recovery" in mild
    assert "read the matched recovery" not in severe and "control" in severe


def test_sentences_speak_of_all_seeds_at_once(found):
    sentences = findings(found.records)
    assert len(sentences) == 2 * 2
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


def test_curves_and_layer_errors_are_read_per_arm(found):
    assert ("tiny_a", "none", "float", 0) in found.curves
    assert ("tiny_a", "mild", "ptq", 0) not in found.curves
    row = found.layer_errors[0]
    assert row.keys() == {"size", "recipe", "arm", "seed", "layer", "error"}


def test_a_directory_without_results_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="finished `gemmaqat compare`"):
        results(tmp_path)


def test_a_newer_summary_is_refused(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="format_version is 99"):
        results(tmp_path)
