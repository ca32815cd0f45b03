"""A comparison for people: a table for the terminal, report.md, a self-contained report.html."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import matplotlib
from matplotlib.figure import Figure

from gemmaqat.evaluation import plots
from gemmaqat.evaluation.results import (
    LABELS,
    NO_RECIPE,
    Results,
    findings,
    over_seeds,
    recovery_text,
)
from gemmaqat.evaluation.statistics import LEVEL

HEADER = (
    "recipe",
    "arm",
    "answer ppl",
    "change, %",
    "KL to base",
    "top-1 agree",
    "tasks",
    "bits/w",
    "ppl recovered",
    "matched",
    "KL recovered",
)
NUMERIC_FROM = 2  # columns from here on are numbers

LEGEND = {
    "answer ppl": "perplexity of the hold-out's answer tokens (loss weight 1); prompts are left "
    "out because much of them is random and the same for every arm. Lower is better.",
    "change, %": "of the answer perplexity against the float base.",
    "KL to base": "mean KL(float base || arm) over answer tokens, nats.",
    "top-1 agree": "share of answer tokens where arm and float base have the same most likely "
    "token.",
    "tasks": "exact match of whole answers, mean over the tasks.",
    "bits/w": "stored bits per parameter, over all parameters, scales included.",
    "ppl recovered": "(ppl of PTQ - ppl of arm) / (ppl of PTQ - ppl of the float base). The row "
    "of the control says what more float training before PTQ does by itself.",
    "matched": "the same with the control in the place of PTQ and the float model it was "
    "made from in the place of the base: what quantized training adds at equal tokens. Not given "
    "for distilled QAT, which is drawn back to the base.",
    "KL recovered": "1 - KL of arm / KL of PTQ, both to the float base.",
}
INTERVALS = (
    f"[ ] are {LEVEL:.0%} bootstrap intervals over hold-out sequences, paired between arms. They "
    "say nothing about other training seeds. Where the interval of the PTQ damage reaches zero "
    "no recovery is given."
)


def write(found: Results) -> None:
    """Writes report.md and report.html into the work directory."""
    (found.workdir / "report.md").write_text(markdown(found))
    (found.workdir / "report.html").write_text(html(found))


def table(found: Results) -> str:
    """The arms as aligned text for a terminal, and what they say."""
    blocks = []
    for title, rows in _groups(found):
        widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
        lines = [title, ""]
        for row in (HEADER, *rows):
            cells = (
                cell.ljust(width) if i < NUMERIC_FROM else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join(cells).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(findings(found.records)), INTERVALS])


def markdown(found: Results) -> str:
    """The report as Markdown, without pictures."""
    parts = [
        f"# QAT against PTQ: {found.workdir.name}",
        *(f"- {s}" for s in findings(found.records)),
    ]
    for title, rows in _groups(found):
        parts += ["", f"## {title}", "", _markdown_row(HEADER)]
        parts.append(_markdown_row(["---"] * NUMERIC_FROM + ["--:"] * (len(HEADER) - NUMERIC_FROM)))
        parts += map(_markdown_row, rows)
    parts += ["", *(f"- **{name}**: {text}" for name, text in LEGEND.items()), "", INTERVALS, ""]
    parts += [f"Config {found.summary['config_hash'][:16]}; {_versions(found)}.", ""]
    return "\n".join(parts)


def html(found: Results) -> str:
    """The report as one HTML page that needs nothing else."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gemmaqat.evaluation", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    first = found.records[0]["seed"]  # one seed's pictures stand for the others
    pairs = [(size, first) for size in dict.fromkeys(r["size"] for r in found.records)]
    return environment.get_template("report.html.jinja").render(
        name=found.workdir.name,
        findings=findings(found.records),
        groups=_groups(found),
        header=HEADER,
        numeric_from=NUMERIC_FROM,
        legend=LEGEND,
        intervals=INTERVALS,
        quality=svg(plots.quality_against_bits(found)),
        recovery=svg(plots.recovery_by_size(found)),
        curves=[(_title(*pair), svg(plots.loss_curves(found, *pair))) for pair in pairs],
        errors=[(_title(*pair), svg(plots.layer_errors(found, *pair))) for pair in pairs],
        config_hash=found.summary["config_hash"],
        config=_flat(found.summary["config"]),
        versions=_versions(found),
    )


def svg(figure: Figure) -> markupsafe.Markup:
    """A figure as an inline SVG element whose ink is the page's text colour."""
    buffer = io.StringIO()
    # The salt makes ids repeatable; they hash what they name, so figures on a page do not clash.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gemmaqat"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(plots.INK, "currentColor")
    # The page scales the picture to the column; its text takes the page's font.
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    return markupsafe.Markup(text)


def _groups(found: Results) -> list[tuple[str, list[list[str]]]]:
    """Title and rows of every size and seed, and of every size over its seeds."""
    groups: dict[str, list[list[str]]] = {}
    for record in [*found.records, *over_seeds(found.records)]:
        groups.setdefault(_title(record["size"], record["seed"]), []).append(_row(record))
    return list(groups.items())


def _row(record: Mapping[str, Any]) -> list[str]:
    metrics = record["metrics"]
    base = metrics["answer_perplexity"] - metrics["answer_perplexity_change"]
    changes = (
        metrics["answer_perplexity_change"],
        *record["intervals"]["answer_perplexity_change"],
    )
    change, low, high = (100 * value / base for value in changes)
    return [
        "" if record["recipe"] == NO_RECIPE else record["recipe"],
        LABELS[record["arm"]],
        f"{metrics['answer_perplexity']:.3f}",
        "" if record["arm"] == "float" else f"{change:+.1f} [{low:+.1f}, {high:+.1f}]",
        f"{metrics['answer_kl_to_base']:.4f}",
        f"{metrics['answer_agreement_with_base']:.1%}",
        f"{metrics['task_mean']:.1%}" if "task_mean" in metrics else "",
        f"{metrics['bits_per_weight']:.2f}",
        recovery_text(record, "recovery"),
        recovery_text(record, "matched_recovery"),
        recovery_text(record, "kl_recovery"),
    ]


def _title(size: str, seed: int | None) -> str:
    return f"{size}, mean over seeds [least, most]" if seed is None else f"{size}, seed {seed}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _versions(found: Results) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.summary["versions"].items())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
