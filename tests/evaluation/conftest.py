"""A comparison made of invented scores, quick to write and with known answers."""

import dataclasses
import json
import types

import numpy as np
import pytest

from gemmaqat import config as configs
from gemmaqat.evaluation.evaluate import FOLDER, Scores
from gemmaqat.evaluation.results import NO_RECIPE, arm_folder, make_records, write_summary
from gemmaqat.quantization.grids import Grid
from gemmaqat.quantization.table import Entry, Table

SIZES = ("tiny_a",)
SEQUENCES, TOKENS = 64, 30.0
MODULES = ("self_attn/q_proj", "self_attn/o_proj", "mlp/gate_proj", "mlp/down_proj")

# Answer NLL per token above the float base, KL to it and to the float model trained on, per arm:
# a mild and a severe recipe.
INVENTED = {
    (NO_RECIPE, "float"): (0.0, 0.0, 0.02),
    (NO_RECIPE, "continued"): (-0.02, 0.02, 0.0),
    ("mild", "ptq"): (0.02, 0.017, 0.036),
    ("mild", "control"): (0.003, 0.035, 0.016),
    ("mild", "qat"): (-0.012, 0.021, 0.004),
    ("mild", "distill"): (0.006, 0.0055, 0.024),
    ("severe", "ptq"): (1.2, 1.15, 1.16),
    ("severe", "control"): (1.3, 1.3, 1.25),
    ("severe", "qat"): (0.04, 0.05, 0.03),
    ("severe", "distill"): (0.05, 0.04, 0.05),
}
BITS = {NO_RECIPE: 32.0, "mild": 8.3, "severe": 6.6}


def make_tables(sizes=SIZES):
    """A matrix on each recipe's grid beside a float table of the same size."""
    found = {}
    for size in sizes:
        for recipe, bits in (("mild", 4), ("severe", 2)):
            float_one = Entry(path="embed_tokens/weight", shape=(64, 64), dtype="float32")
            packed = dataclasses.replace(float_one, path="layer/weight", grid=Grid(bits=bits))
            found[size, recipe] = Table((float_one, packed), recipe=recipe)
    return found


def make_scores(nll, kl, kl_to_continued=0.01, *, seed, bits=32.0, errors=None, noise=0.0):
    """Scores whose sequences differ by half a nat, the same way for all arms of a seed."""
    shared = 1.0 + 0.5 * np.random.default_rng(seed).normal(size=SEQUENCES)
    own = noise * np.random.default_rng(hash((nll, kl)) % 2**32).normal(size=SEQUENCES)
    per_token = {
        "nll": shared + nll + own,
        "correct": np.full(SEQUENCES, 0.6 - 0.2 * kl),
        "kl_to_base": np.full(SEQUENCES, kl) * (1 + 0.1 * shared),
        "kl_to_continued": np.full(SEQUENCES, kl_to_continued) * (1 + 0.1 * shared),
        "agreement_with_base": np.full(SEQUENCES, 1 - 0.3 * kl),
    }
    columns = {}
    for tokens in ("answer", "all"):
        columns[f"{tokens}_tokens"] = np.full(SEQUENCES, TOKENS)
        columns |= {f"{tokens}_{name}": TOKENS * value for name, value in per_token.items()}
    mean = {name: float(np.mean(value)) for name, value in per_token.items()}
    metrics = {
        "answer_perplexity": float(np.exp(mean["nll"])),
        "answer_kl_to_base": mean["kl_to_base"],
        "answer_agreement_with_base": mean["agreement_with_base"],
        "task/copy": 0.9,
        "task_mean": 0.9 - 0.4 * kl,
        "bytes": bits * 1000,
        "bits_per_weight": bits,
    }
    return Scores(columns, ("copy",), np.asarray([True]), metrics, errors or {})


def invent(*, sizes=SIZES, seeds=(0,)):
    """Scores of every arm by (size, recipe, arm, seed)."""
    scores = {}
    for size in sizes:
        for seed in seeds:
            for (recipe, arm), (nll, kl, kl_to_continued) in INVENTED.items():
                draw = np.random.default_rng(seed)
                errors = {
                    f"layers/{layer}/{module}": float(draw.uniform(0.1, 0.4))
                    for layer in range(4)
                    for module in MODULES
                    if recipe != NO_RECIPE
                }
                scores[size, recipe, arm, seed] = make_scores(
                    nll * (1 + 0.1 * seed),
                    kl,
                    kl_to_continued,
                    seed=seed,
                    bits=BITS[recipe],
                    errors=errors,
                )
    return scores


def write(workdir, **kinds):
    """The work directory that a comparison with these scores leaves."""
    scores = invent(**kinds)
    for key, found in scores.items():
        size, recipe, arm, seed = key
        folder = arm_folder(workdir, size, recipe, arm, seed)
        found.save(folder / FOLDER)
        if arm not in ("ptq", "control"):
            steps = range(0, 600, 10) if arm == "float" else range(0, 100, 10)
            start = 3.0 if arm == "float" else 0.3 + found.metrics["answer_kl_to_base"]
            lines = [
                {"step": step, "train/loss": 0.2 + start * float(np.exp(-step / 120))}
                for step in steps
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write_summary(
        workdir,
        make_records(scores, tables=make_tables(kinds.get("sizes", SIZES)), bootstrap_samples=200),
        experiment=configs.parse(configs.base()),
        versions={"gemmaqat": "0.0.0"},
    )


@pytest.fixture(scope="session")
def fabricated():
    """The functions of this file, and what they invent."""
    return types.SimpleNamespace(
        INVENTED=INVENTED,
        make_scores=make_scores,
        make_tables=make_tables,
        invent=invent,
        write=write,
    )
