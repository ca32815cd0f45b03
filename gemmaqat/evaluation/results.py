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
from gemmaqat.evaluation.evaluate import FOLDER, UNCLAMPED, Scores
from gemmaqat.evaluation.statistics import Bootstrap, Interval, Recovery
from gemmaqat.json_file import read_json
from gemmaqat.quantization.table import Table

FORMAT_VERSION = 2
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

RECOVERING_ARMS = ("control", "qat", "distill")

# The float model that quantization is to leave unchanged. Arms that train on with the task's own
# loss move away from the base as the float model trained on does: they are held to that one.
OWN_FLOAT = {
    "float": "base",
    "continued": "continued",
    "ptq": "base",
    "control": "continued",
    "qat": "continued",
    "distill": "base",
}
# The recovery of the KL to an arm's own float; rounding that float recovers nothing of it.
OWN_KL_RECOVERY = {"qat": "matched_kl_recovery", "distill": "kl_recovery"}

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
    summary = read_json(path, "restore it from a copy")
    if summary.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {summary.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}; run the same `gemmaqat compare` again, which trains nothing twice."
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


def make_records(
    scores: Mapping[Key, Scores],
    *,
    tables: Mapping[tuple[str, str], Table],
    bootstrap_samples: int,
) -> list[dict[str, Any]]:
    """One record per arm, in the order given, recoveries included.

    Args:
        scores: of every arm; quantized arms need their ptq, the float base, and for the matched
            recoveries of qat the control and the float model it was made from.
        tables: size and recipe to what it does to every weight.
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
            "answer_kl_to_own": bootstrap.interval(found.sums(f"kl_to_{OWN_FLOAT[arm]}").mean),
            "answer_perplexity_change": _change(bootstrap, base, found),
        }
        if f"{UNCLAMPED}answer_perplexity" in found.metrics:
            intervals |= _without_clamps(bootstrap, found, to=OWN_FLOAT[arm])
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
                "metrics": found.metrics
                | ({} if recipe == NO_RECIPE else _coverage(tables[size, recipe]))
                | {name: i.value for name, i in intervals.items()},
                "intervals": {name: [i.low, i.high] for name, i in intervals.items()},
                "notes": notes,
            }
        )
    return records


def _coverage(table: Table) -> dict[str, float]:
    """The share of parameters that are quantized, and the stored bits of one of them."""
    quantized = sum(entry.num_weights for entry in table.quantized)
    return {
        "quantized_share": quantized / sum(entry.num_weights for entry in table.entries),
        "quantized_bits_per_weight": table.bits_per_weight(quantized_only=True),
    }


def _change(bootstrap: Bootstrap, base: Scores, found: Scores) -> Interval:
    before, after = base.sums("nll"), found.sums("nll")
    return bootstrap.interval(lambda w: after.perplexity(w) - before.perplexity(w))


def _without_clamps(bootstrap: Bootstrap, found: Scores, *, to: str) -> dict[str, Interval]:
    """What the same weights do with float activations, and the change from the clamped model."""
    nll = found.sums("nll", tokens=f"{UNCLAMPED}answer")
    kl = found.sums(f"kl_to_{to}", tokens=f"{UNCLAMPED}answer")
    clamped = found.sums("nll")
    return {
        "unclamped_answer_perplexity": bootstrap.interval(nll.perplexity),
        "unclamped_answer_kl_to_own": bootstrap.interval(kl.mean),
        "unclamped_answer_perplexity_change": bootstrap.interval(
            lambda w: nll.perplexity(w) - clamped.perplexity(w)
        ),
    }


def _recoveries(
    bootstrap: Bootstrap, scores: Mapping[Key, Scores], key: Key
) -> dict[str, Recovery]:
    """`recovery` and `kl_recovery`, both to the base, and for qat `matched_recovery` and
    `matched_kl_recovery`, to the float model trained on; nothing for float and ptq.
    """
    size, recipe, arm, seed = key
    if arm not in RECOVERING_ARMS:
        return {}
    nll = lambda recipe, arm: scores[size, recipe, arm, seed].sums("nll")  # noqa: E731
    kl = lambda arm, to="base": scores[size, recipe, arm, seed].sums(f"kl_to_{to}")  # noqa: E731
    found = {
        "recovery": bootstrap.perplexity_recovery(
            reference=nll(NO_RECIPE, "float"), ptq=nll(recipe, "ptq"), arm=nll(recipe, arm)
        ),
        "kl_recovery": bootstrap.kl_recovery(ptq=kl("ptq"), arm=kl(arm)),
    }
    if arm == "qat":
        # Not for distill: it is drawn to the base, which the control has left.
        found["matched_recovery"] = bootstrap.perplexity_recovery(
            reference=nll(NO_RECIPE, "continued"),
            ptq=nll(recipe, "control"),
            arm=nll(recipe, arm),
        )
        found["matched_kl_recovery"] = bootstrap.kl_recovery(
            ptq=kl("control", "continued"), arm=kl(arm, "continued")
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


def kl_against(
    found: Results,
    recipe: str,
    other: str,
    *,
    size: str,
    arm: str,
    seed: int = 0,
    tokens: str = "answer",
) -> tuple[Interval, Interval]:
    """What one recipe costs beside another: the KL of an arm to its own float model under both.

    Args:
        found: a comparison of both recipes, so that base, hold-out and training data are shared.
        recipe: the one in question.
        other: the one it is held against.
        size: of the model.
        arm: "ptq", "control", "qat" or "distill".
        seed: of the base.
        tokens: "answer" or "all".

    Returns:
        KL of `recipe` less that of `other` (nats), and the former over the latter; intervals are
        paired over the hold-out's sequences.

    Raises:
        FileNotFoundError: the comparison has no such arm.
    """
    ours, theirs = (
        Scores.load(arm_folder(found.workdir, size, name, arm, seed) / FOLDER).sums(
            f"kl_to_{OWN_FLOAT[arm]}", tokens=tokens
        )
        for name in (recipe, other)
    )
    samples = found.summary["config"]["evaluation"]["bootstrap_samples"]
    bootstrap = Bootstrap(len(ours.total), samples=samples)
    return (
        bootstrap.interval(lambda w: ours.mean(w) - theirs.mean(w)),
        bootstrap.interval(lambda w: ours.mean(w) / theirs.mean(w)),
    )


def recovery_text(record: Mapping[str, Any], name: str) -> str:
    """`82 % [79, 85]`, the reason for having no number, or nothing where it is not defined."""
    if name in record["notes"]:
        return record["notes"][name]
    if name not in record["metrics"]:
        return ""
    value, low, high = (100 * x for x in (record["metrics"][name], *record["intervals"][name]))
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"
