"""The results of a comparison: from the scores of its arms to records, and back from files.

A record is one (size, recipe, arm, seed) with all its metrics. Numbers that need two or three
arms (damage, recoveries) are computed here, from scores on the same sequences.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemmaqat.config import Experiment, to_json
from gemmaqat.evaluation.evaluate import FOLDER, Scores
from gemmaqat.evaluation.statistics import Bootstrap, Interval, Recovery

FORMAT_VERSION = 1
SUMMARY = "summary.json"
NO_RECIPE = "none"  # of the float arms

# Names of the arms, in the order in which they are shown, and what they are called there.
FLOAT_ARMS = {"float": "float base", "continued": "float, trained on"}
QUANTIZED_ARMS = {
    "ptq": "PTQ",
    "control": "control (float, then PTQ)",
    "qat": "QAT",
    "distill": "distilled QAT",
}
LABELS = FLOAT_ARMS | QUANTIZED_ARMS

# Above this recovery of the control alone, more training by itself explains much of an arm's
# plain recovery; the matched one and that of the KL remain.
CONTROL_CONFOUNDS = 0.2

Key = tuple[str, str, str, int]  # size, recipe, arm, seed


@dataclasses.dataclass(frozen=True)
class Results:
    """A finished comparison, as read by `results`.

    Attributes:
        workdir: where it lies.
        summary: the content of summary.json.
        curves: per (size, recipe, arm, seed) the lines of the arm's metrics.jsonl.
        layer_errors: rows with size, recipe, arm, seed, layer (module path) and error: the
            relative RMS difference between quantized weight and its float master.
    """

    workdir: Path
    summary: dict[str, Any]
    curves: dict[Key, list[dict[str, Any]]]
    layer_errors: list[dict[str, Any]]

    @property
    def records(self) -> list[dict[str, Any]]:
        """One per size, recipe, arm and seed, with `metrics`, `intervals` and `notes`."""
        return self.summary["records"]

    def record(self, size: str, recipe: str, arm: str, seed: int) -> dict[str, Any]:
        """One record; KeyError with the known ones if there is none."""
        found = {key_of(record): record for record in self.records}
        return found[size, recipe, arm, seed]


def results(workdir: str | Path) -> Results:
    """Reads the work directory of a finished comparison.

    Raises:
        FileNotFoundError: there is no summary.json.
        ValueError: it was written by another format version.
    """
    path = Path(workdir) / SUMMARY
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; give the work directory of a finished `gemmaqat compare`."
        )
    summary = json.loads(path.read_text())
    if summary.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {summary.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}; use the version of gemmaqat that wrote it."
        )
    curves, layer_errors = {}, []
    for key in map(key_of, summary["records"]):
        folder = arm_folder(Path(workdir), *key)
        history = folder / "metrics.jsonl"
        if history.is_file():
            curves[key] = [json.loads(line) for line in history.read_text().splitlines()]
        identity = dict(zip(("size", "recipe", "arm", "seed"), key, strict=True))
        layer_errors += [
            identity | {"layer": layer, "error": error}
            for layer, error in Scores.load(folder / FOLDER).layer_errors.items()
        ]
    return Results(Path(workdir), summary, curves, layer_errors)


def write_summary(
    workdir: Path,
    records: list[dict[str, Any]],
    *,
    experiment: Experiment,
    versions: Mapping[str, str],
) -> None:
    """Writes summary.json, atomically."""
    config = to_json(experiment)
    summary = {
        "format_version": FORMAT_VERSION,
        "records": records,
        "versions": dict(versions),
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "config": config,
    }
    temporary = workdir / f".{SUMMARY}.tmp"
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    temporary.replace(workdir / SUMMARY)


def arm_folder(workdir: Path, size: str, recipe: str, arm: str, seed: int) -> Path:
    """Work directory of one arm."""
    shared = workdir / size / f"seed{seed}"
    if arm in FLOAT_ARMS:
        return shared / {"float": "base"}.get(arm, arm)
    return shared / recipe / arm


def key_of(record: Mapping[str, Any]) -> Key:
    """What identifies a record."""
    return record["size"], record["recipe"], record["arm"], record["seed"]


def make_records(scores: Mapping[Key, Scores], *, bootstrap_samples: int) -> list[dict[str, Any]]:
    """One record per arm, in the order given, recoveries included.

    Args:
        scores: of every arm; quantized arms need their ptq, the float base, and for the matched
            recovery of qat the control and the float model it was made from.
        bootstrap_samples: resamples for intervals.
    """
    records = []
    for key, found in scores.items():
        size, recipe, arm, seed = key
        bootstrap = Bootstrap(len(found.sums("nll").total), samples=bootstrap_samples)
        base = scores[size, NO_RECIPE, "float", seed]
        intervals = {
            "answer_perplexity": bootstrap.interval(found.sums("nll").perplexity),
            "all_perplexity": bootstrap.interval(found.sums("nll", tokens="all").perplexity),
            "answer_kl_to_base": bootstrap.interval(found.sums("kl_to_base").mean),
            "answer_perplexity_change": _change(bootstrap, base, found),
        }
        notes = {}
        for name, recovery in _recoveries(bootstrap, scores, key).items():
            if recovery.share is None:
                notes[name] = recovery.text
            else:
                intervals[name] = recovery.share
        records.append(
            {
                "size": size,
                "recipe": recipe,
                "arm": arm,
                "seed": seed,
                "metrics": found.metrics | {name: i.value for name, i in intervals.items()},
                "intervals": {name: [i.low, i.high] for name, i in intervals.items()},
                "notes": notes,
            }
        )
    return records


def _change(bootstrap: Bootstrap, base: Scores, found: Scores) -> Interval:
    before, after = base.sums("nll"), found.sums("nll")
    return bootstrap.interval(lambda w: after.perplexity(w) - before.perplexity(w))


def _recoveries(
    bootstrap: Bootstrap, scores: Mapping[Key, Scores], key: Key
) -> dict[str, Recovery]:
    """`recovery`, `kl_recovery` and, for qat, `matched_recovery`; nothing for float and ptq."""
    size, recipe, arm, seed = key
    if arm not in QUANTIZED_ARMS or arm == "ptq":
        return {}
    nll = lambda recipe, arm: scores[size, recipe, arm, seed].sums("nll")  # noqa: E731
    kl = lambda arm: scores[size, recipe, arm, seed].sums("kl_to_base")  # noqa: E731
    found = {
        "recovery": bootstrap.perplexity_recovery(
            reference=nll(NO_RECIPE, "float"), ptq=nll(recipe, "ptq"), arm=nll(recipe, arm)
        ),
        "kl_recovery": bootstrap.kl_recovery(ptq=kl("ptq"), arm=kl(arm)),
    }
    if arm == "qat":
        # Not for distill: it is drawn to the base, while the control has moved on from it.
        found["matched_recovery"] = bootstrap.perplexity_recovery(
            reference=nll(NO_RECIPE, "continued"),
            ptq=nll(recipe, "control"),
            arm=nll(recipe, arm),
        )
    return found


def over_seeds(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record per size, recipe and arm that has several seeds: means, and as `intervals` the
    smallest and the largest value. Where one seed has no number there is none.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(key_of(record)[:3], []).append(record)
    found = []
    for (size, recipe, arm), group in groups.items():
        if len(group) < 2:
            continue
        shared = set.intersection(*(set(record["metrics"]) for record in group))
        values = {name: [record["metrics"][name] for record in group] for name in shared}
        found.append(
            {
                "size": size,
                "recipe": recipe,
                "arm": arm,
                "seed": None,
                "metrics": {name: sum(v) / len(v) for name, v in values.items()},
                "intervals": {name: [min(v), max(v)] for name, v in values.items()},
                "notes": {name: text for record in group for name, text in record["notes"].items()},
            }
        )
    return found


def findings(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the records say, in a few sentences per size and recipe; over seeds if several."""
    records = list(records)
    averaged = over_seeds(records)
    by_key = {(r["size"], r["recipe"], r["arm"]): r for r in averaged or records}
    sentences = []
    for size, recipe, arm in by_key:
        if arm != "ptq":
            continue
        where = f"{size}, {recipe}" + (" (mean over seeds [least, most])" if averaged else "")
        base, ptq = by_key[size, NO_RECIPE, "float"], by_key[size, recipe, arm]
        sentence = f"{where}: {_damage_sentence(base, ptq)}"
        control = by_key.get((size, recipe, "control"))
        trained = [by_key.get((size, recipe, name)) for name in ("qat", "distill")]
        present = [record for record in trained if record is not None]
        if control is not None and present:
            sentence += " " + _recovery_sentence(present, control)
        sentences.append(sentence)
    return sentences


def _damage_sentence(base: Mapping[str, Any], ptq: Mapping[str, Any]) -> str:
    change = ptq["metrics"]["answer_perplexity_change"]
    low, high = ptq["intervals"]["answer_perplexity_change"]
    before, after = (r["metrics"]["answer_perplexity"] for r in (base, ptq))
    percent = 100 / before
    text = f"PTQ changes the answer perplexity from {before:.3f} to {after:.3f} "
    text += f"({percent * change:+.1f} % [{percent * low:+.1f}, {percent * high:+.1f}])"
    return text + (", which is within noise." if low <= 0 else ".")


def _recovery_sentence(trained: Iterable[Mapping[str, Any]], control: Mapping[str, Any]) -> str:
    if "recovery" in control["notes"]:
        parts = [f"{LABELS[r['arm']]} {recovery_text(r, 'kl_recovery')}" for r in trained]
        return f"No recovery of perplexity is given; of the KL to the base: {', '.join(parts)}."
    parts = [f"{LABELS[r['arm']]} {recovery_text(r, 'recovery')}" for r in trained]
    alone = recovery_text(control, "recovery")
    text = f"Recovered: {', '.join(parts)}; the control without quantized training {alone}."
    if control["metrics"]["recovery"] > CONTROL_CONFOUNDS:
        matched = [recovery_text(r, "matched_recovery") for r in trained if r["arm"] == "qat"]
        kl = [f"{LABELS[r['arm']]} {recovery_text(r, 'kl_recovery')}" for r in trained]
        text += (
            " More training alone explains much of that: read the matched recovery "
            f"(QAT {', '.join(matched)}) and that of the KL ({', '.join(kl)}) instead."
        )
    return text


def recovery_text(record: Mapping[str, Any], name: str) -> str:
    """`82 % [79, 85]`, the reason for having no number, or nothing where it is not defined."""
    if name in record["notes"]:
        return record["notes"][name]
    if name not in record["metrics"]:
        return ""
    value, low, high = (100 * x for x in (record["metrics"][name], *record["intervals"][name]))
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"
