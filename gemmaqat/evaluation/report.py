"""A comparison for people: a table for the terminal, report.md, a self-contained report.html."""

import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib
from matplotlib.figure import Figure

from gemmaqat.evaluation import plots
from gemmaqat.evaluation.findings import findings
from gemmaqat.evaluation.results import (
    LABELS,
    NO_RECIPE,
    OWN_FLOAT,
    RECOVERING_ARMS,
    Results,
    over_seeds,
    recovery_text,
)
from gemmaqat.evaluation.statistics import LEVEL

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of numbers: its head, what it means, and the text in a record's row."""

    name: str
    meaning: str
    cell: Callable[[Record], str]


def _number(metric: str, form: str) -> Callable[[Record], str]:
    """The cell of a metric, empty where a record has none."""
    return lambda r: format(r["metrics"][metric], form) if metric in r["metrics"] else ""


def _change(record: Record) -> str:
    metrics = record["metrics"]
    base = metrics["answer_perplexity"] - metrics["answer_perplexity_change"]
    low, high = record["intervals"]["answer_perplexity_change"]
    change, low, high = (100 * x / base for x in (metrics["answer_perplexity_change"], low, high))
    return "" if record["arm"] == "float" else f"{change:+.1f} [{low:+.1f}, {high:+.1f}]"


def _unclamped_change(record: Record) -> str:
    name = "unclamped_answer_perplexity_change"
    percent = 100 / record["metrics"]["answer_perplexity"]
    change, low, high = (percent * x for x in (record["metrics"][name], *record["intervals"][name]))
    return f"{change:+.2f} [{low:+.2f}, {high:+.2f}]"


def _megabytes(record: Record) -> str:
    size = record["metrics"]["bytes"] / 1e6
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def _plain_kl_recovery(record: Record) -> str:
    text = recovery_text(record, "kl_recovery")
    return f"{text} †" if text and OWN_FLOAT[record["arm"]] != "base" else text


QUALITY = (
    Column(
        "answer ppl",
        "perplexity of the hold-out's answer tokens (loss weight 1); prompts are left out because "
        "much of them is random and the same for every arm. Lower is better.",
        _number("answer_perplexity", ".3f"),
    ),
    Column("change, %", "of the answer perplexity against the float base.", _change),
    Column(
        "KL to own float",
        "mean KL(float || arm) over answer tokens, nats, to the float model that quantization is "
        "to leave unchanged: the float base for PTQ and distilled QAT (its teacher), the float "
        "model trained on for the control and QAT, which train on the same tokens.",
        _number("answer_kl_to_own", ".4f"),
    ),
    Column(
        "KL to base",
        "the same to the float base for every arm. For arms that train on it contains what "
        "training alone changes (drift: the row of the float model trained on).",
        _number("answer_kl_to_base", ".4f"),
    ),
    Column(
        "top-1 agree",
        "share of answer tokens where arm and float base have the same most likely token.",
        _number("answer_agreement_with_base", ".1%"),
    ),
    Column(
        "tasks", "exact match of whole answers, mean over the tasks.", _number("task_mean", ".1%")
    ),
)
RECOVERY = (
    Column(
        "ppl recovered",
        "(ppl of PTQ - ppl of arm) / (ppl of PTQ - ppl of the float base). The row of the control "
        "says what more float training before PTQ does by itself.",
        lambda r: recovery_text(r, "recovery"),
    ),
    Column(
        "matched ppl",
        "the same with the control in the place of PTQ and the float model it was made from in the "
        "place of the base: what quantized training adds at equal tokens. Not given for distilled "
        "QAT, which is drawn back to the base.",
        lambda r: recovery_text(r, "matched_recovery"),
    ),
    Column(
        "KL recovered",
        "1 - KL of arm / KL of PTQ, both to the float base. † drift included: these arms train on "
        "and leave the base, quantized or not; see the matched KL.",
        _plain_kl_recovery,
    ),
    Column(
        "matched KL",
        "1 - KL of QAT / KL of the control, both to the float model trained on.",
        lambda r: recovery_text(r, "matched_kl_recovery"),
    ),
)
CLAMPS = (
    Column(
        "ppl, clamps on",
        "answer perplexity of the model as it is: the clamps of its activations are part of it.",
        _number("answer_perplexity", ".3f"),
    ),
    Column(
        "ppl, clamps off",
        "the same weights with float activations: what a runtime computes that drops the clamps.",
        _number("unclamped_answer_perplexity", ".3f"),
    ),
    Column("change by dropping, %", "of the perplexity with clamps.", _unclamped_change),
    Column(
        "KL to own, on",
        "mean KL to the own float model over answer tokens, nats.",
        _number("answer_kl_to_own", ".4f"),
    ),
    Column(
        "KL to own, off", "the same without clamps.", _number("unclamped_answer_kl_to_own", ".4f")
    ),
    Column("tasks, on", "exact match, mean over the tasks.", _number("task_mean", ".1%")),
    Column("tasks, off", "the same without clamps.", _number("unclamped_task_mean", ".1%")),
)
STORAGE = (
    Column(
        "share quantized",
        "of all parameters. The rest stays float: norms, the router, and, in recipes whose names "
        "do not end in _emb, the embedding tables: about half of a quantized miniature's bytes.",
        _number("quantized_share", ".0%"),
    ),
    Column(
        "bits of those",
        "stored bits per quantized parameter, scales included.",
        _number("quantized_bits_per_weight", ".2f"),
    ),
    Column(
        "bits of all",
        "stored bits per parameter, the float ones with their own type.",
        _number("bits_per_weight", ".2f"),
    ),
    Column("MB", "stored size of all parameters, 10^6 bytes.", _megabytes),
)

INTERVALS = (
    f"[ ] are {LEVEL:.0%} bootstrap intervals over hold-out sequences, paired between arms. They "
    "say nothing about other training seeds. Where the interval of the PTQ damage reaches zero "
    "no recovery is given."
)


def write(found: Results) -> None:
    """Writes report.md and report.html into the work directory."""
    (found.workdir / "report.md").write_text(markdown(found))
    (found.workdir / "report.html").write_text(html(found))


def write_figures(
    found: Results, folder: str | Path, *, formats: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Writes every picture of the report as files of its own, readable on white and on black.

    Args:
        found: a finished comparison.
        folder: gets `quality_against_bits`, `recovery_by_size`, and per size, of its first seed,
            `loss_curves_<size>` and `layer_errors_<size>`; created where missing.
        formats: file name endings that matplotlib knows.

    Returns:
        The files.
    """
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "quality_against_bits": plots.quality_against_bits(found),
        "recovery_by_size": plots.recovery_by_size(found),
    }
    for size, seed in _shown(found):
        pictures[f"loss_curves_{size}"] = plots.loss_curves(found, size, seed)
        pictures[f"layer_errors_{size}"] = plots.layer_errors(found, size, seed)
    for name, figure in pictures.items():
        for ending in formats:
            path = folder / f"{name}.{ending}"
            # Text as outlines: such a file is shown where the page's fonts are out of reach.
            with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "gemmaqat"}):
                metadata = {"Date": None} if ending == "svg" else None
                figure.savefig(path, dpi=160, metadata=metadata)
            written.append(path)
    return written


def table(found: Results) -> str:
    """The arms as aligned text for a terminal, and what they say."""
    blocks = []
    for group in _groups(found):
        blocks.append(group.title)
        for part in group.tables:
            widths = [max(map(len, column)) for column in zip(part.header, *part.rows, strict=True)]
            lines = []
            for row in (part.header, *part.rows):
                cells = (
                    cell.ljust(width) if i < part.labels else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(row, widths, strict=True))
                )
                lines.append("  ".join(cells).rstrip())
            blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(findings(found.records)), INTERVALS])


def markdown(found: Results) -> str:
    """The report as Markdown, without pictures."""
    parts = [
        f"# QAT against PTQ: {found.workdir.name}",
        "",
        *(f"- {s}" for s in findings(found.records)),
    ]
    for group in _groups(found):
        parts += ["", f"## {group.title}"]
        for part in group.tables:
            numbers = len(part.header) - part.labels
            parts += ["", _markdown_row(part.header)]
            parts.append(_markdown_row(["---"] * part.labels + ["--:"] * numbers))
            parts += map(_markdown_row, part.rows)
    parts += ["", *(f"- **{c.name}**: {c.meaning}" for c in _legend(found))]
    parts += ["", INTERVALS, ""]
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
    pairs = _shown(found)
    return environment.get_template("report.html.jinja").render(
        name=found.workdir.name,
        findings=findings(found.records),
        groups=_groups(found),
        legend=_legend(found),
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


@dataclasses.dataclass(frozen=True)
class _Table:
    labels: int  # so many columns in front are words, the others numbers
    header: tuple[str, ...]
    rows: list[list[str]]


@dataclasses.dataclass(frozen=True)
class _Group:
    """The tables of one size and seed, or of one size over its seeds."""

    title: str
    tables: tuple[_Table, ...]


def _groups(found: Results) -> list[_Group]:
    groups: dict[str, list[Record]] = {}
    for record in [*found.records, *over_seeds(found.records)]:
        groups.setdefault(_title(record["size"], record["seed"]), []).append(record)
    return [_Group(title, tuple(_tables(records))) for title, records in groups.items()]


def _tables(records: Sequence[Record]) -> Iterator[_Table]:
    """Quality of all arms, recovery of those that can have one, the clamps of recipes that have
    some, storage of each recipe.
    """
    recipe = lambda r: "" if r["recipe"] == NO_RECIPE else r["recipe"]  # noqa: E731
    both = {"recipe": recipe, "arm": lambda r: LABELS[r["arm"]]}
    yield _table(both, QUALITY, records)
    yield _table(both, RECOVERY, [r for r in records if r["arm"] in RECOVERING_ARMS])
    clamped = [r for r in records if _has_clamps(r)]
    if clamped:
        yield _table(both, CLAMPS, clamped)
    alone = {"recipe": lambda r: recipe(r) or "float"}
    yield _table(alone, STORAGE, [r for r in records if r["arm"] in ("float", "ptq")])


def _table(
    labels: Mapping[str, Callable[[Record], str]],
    columns: Sequence[Column],
    records: Sequence[Record],
) -> _Table:
    cells = [*labels.values(), *(column.cell for column in columns)]
    header = (*labels, *(column.name for column in columns))
    return _Table(len(labels), header, [[cell(record) for cell in cells] for record in records])


def _shown(found: Results) -> list[tuple[str, int]]:
    """Every size with the seed whose pictures stand for the others."""
    first = found.records[0]["seed"]
    return [(size, first) for size in dict.fromkeys(r["size"] for r in found.records)]


def _legend(found: Results) -> tuple[Column, ...]:
    """Every column that is shown."""
    clamps = CLAMPS if any(map(_has_clamps, found.records)) else ()
    return QUALITY + RECOVERY + clamps + STORAGE


def _has_clamps(record: Record) -> bool:
    return "unclamped_answer_perplexity" in record["metrics"]


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
