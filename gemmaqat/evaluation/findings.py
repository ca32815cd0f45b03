"""What a comparison says, in sentences."""

from collections.abc import Iterable, Mapping
from typing import Any

from gemmaqat.evaluation.results import (
    LABELS,
    NO_RECIPE,
    OWN_KL_RECOVERY,
    over_seeds,
    recovery_text,
)

# Above this recovery of the control, more training by itself explains much of an arm's plain one.
CONTROL_CONFOUNDS = 0.2


def findings(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Per size what training on does by itself, then each recipe; over seeds if several."""
    records = list(records)
    averaged = over_seeds(records)
    over = " (mean over seeds [least, most])" if averaged else ""
    by_key = {(r["size"], r["recipe"], r["arm"]): r for r in averaged or records}
    sentences = []
    for size, recipe, arm in by_key:
        of_arm = lambda arm: by_key.get((size, recipe, arm))  # noqa: B023, E731
        if arm == "continued":
            sentences.append(f"{size}{over}: {_drift_sentence(by_key[size, recipe, arm])}")
        if arm != "ptq":
            continue
        parts = [_damage_sentence(by_key[size, NO_RECIPE, "float"], by_key[size, recipe, arm])]
        control, trained = of_arm("control"), [of_arm(name) for name in OWN_KL_RECOVERY]
        present = [record for record in trained if record is not None]
        if control is not None and present:
            parts += [_recovery_sentences(present, control), _kl_sentence(present)]
        sentences.append(f"{size}, {recipe}{over}: {' '.join(parts)}")
    return sentences


def _drift_sentence(continued: Mapping[str, Any]) -> str:
    kl, (low, high) = (continued[k]["answer_kl_to_base"] for k in ("metrics", "intervals"))
    return (
        f"training on moves the float model by a KL of {kl:.4f} [{low:.4f}, {high:.4f}] from the "
        "base, nothing quantized (drift). The control and QAT train on likewise, so their KL is "
        "taken to that model; PTQ and distilled QAT keep to the base."
    )


def _damage_sentence(base: Mapping[str, Any], ptq: Mapping[str, Any]) -> str:
    change = ptq["metrics"]["answer_perplexity_change"]
    low, high = ptq["intervals"]["answer_perplexity_change"]
    before, after = (r["metrics"]["answer_perplexity"] for r in (base, ptq))
    percent = 100 / before
    text = f"PTQ changes the answer perplexity from {before:.3f} to {after:.3f} "
    text += f"({percent * change:+.1f} % [{percent * low:+.1f}, {percent * high:+.1f}])"
    return text + (", which is within noise." if low <= 0 else ".")


def _recovery_sentences(trained: list[Mapping[str, Any]], control: Mapping[str, Any]) -> str:
    """Shares of the perplexity's damage, and how far they can be owed to training alone."""
    if "recovery" in control["notes"]:
        return "No recovery of perplexity is given."
    parts = [f"{LABELS[r['arm']]} {recovery_text(r, 'recovery')}" for r in trained]
    alone = recovery_text(control, "recovery")
    text = f"Recovered: {', '.join(parts)}; the control without quantized training {alone}."
    if control["metrics"]["recovery"] <= CONTROL_CONFOUNDS:
        return text
    # Only what holds at the interval's low end is said outright.
    if control["intervals"]["recovery"][0] > CONTROL_CONFOUNDS:
        text += f" More training alone explains much of that ({alone})"
    else:
        text += f" More training alone may explain part of that ({alone})"
    matched = [recovery_text(r, "matched_recovery") for r in trained if r["arm"] == "qat"]
    return text + "".join(f"; read the matched recovery, QAT {m}" for m in matched) + "."


def _kl_sentence(trained: list[Mapping[str, Any]]) -> str:
    parts = [f"{LABELS[r['arm']]} {recovery_text(r, OWN_KL_RECOVERY[r['arm']])}" for r in trained]
    return f"Recovered of the KL to the own float model: {', '.join(parts)}."
