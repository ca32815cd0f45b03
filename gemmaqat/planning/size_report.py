"""Sizes and fits as text and as a picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gemmaqat.models.sizes import model_config
from gemmaqat.planning.devices import format_bytes
from gemmaqat.planning.size import UNITS, Fit, Size, fit_families, traffic

# Told apart by people with any colour vision (Okabe and Ito).
_FAMILY_COLORS = {
    "linears": "#0072b2",
    "experts": "#56b4e9",
    "embeddings": "#009e73",
    "scales": "#e69f00",
    "norms": "#f0e442",
    "kv_cache": "#d55e00",
    "per_layer_embeddings": "#bbbbbb",
}
_SIZE_COLORS = {
    "e2b": "#0072b2",
    "e4b": "#009e73",
    "12b": "#e69f00",
    "26b_a4b": "#cc79a7",
    "31b": "#d55e00",
}
_DASHES = ("-", "--", ":", "-.")


def render(sizes: Sequence[Size]) -> str:
    """Two lines per figure: the total with its convention, and its families."""
    lines = []
    for size in sizes:
        shown = size.bytes / UNITS[size.unit]
        cache = f"; {size.kv_cache} cache of {size.context:,} positions" if size.context else ""
        total = f"{size.bytes:>15,} bytes {shown:>8.2f} {size.unit:<3}"
        lines.append(f"{size.size:<8} {size.format:<18} {total}  {size.convention}{cache}")
        families = ", ".join(f"{name} {count:,}" for name, count in size.families.items())
        lines.append(f"{'':28}{families}")
    return "\n".join(lines)


def render_fits(fits: Sequence[Fit], *, memory: int | float) -> str:
    """One row per size, format and context, and what the columns mean."""
    header = (
        "size", "format", "context", "resident", "on storage", "fits", "largest context",
        "bytes/token", "tokens/s at most",
    )  # fmt: skip
    rows = [header]
    for item in fits:
        rate = item.tokens_per_second
        rows.append(
            (
                item.size.size,
                item.size.format,
                f"{item.size.context:,}",
                format_bytes(item.resident),
                format_bytes(item.on_storage) if item.on_storage else "-",
                "yes" if item.fits else "no",
                f"{item.largest_context:,}" if item.largest_context else "-",
                format_bytes(item.traffic.bytes),
                "-" if rate is None or not item.fits else f"{rate:.3g}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    table = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    notes = (
        f"memory {format_bytes(memory)}; one sequence of text, batch 1. Resident: weights without "
        "encoders, per-layer table,",
        "unused tensors and metadata, plus the key/value cache at the context. On storage: the "
        "per-layer table, one row a token.",
        "Bytes per token: active weights, head, cache windows and one row of each table. The rate "
        "is bandwidth over these bytes;",
        "activations, arithmetic and everything else the memory holds come on top.",
    )
    return "\n".join([*table, "", *notes])


def draw_fits(fits: Sequence[Fit], *, memory: int | float, bandwidth: int | float | None) -> Figure:
    """Left: what is resident, against the memory. Right: what a token costs, against context."""
    combinations = list({(item.size.size, item.size.format): item for item in fits}.values())
    figure = Figure(figsize=(12, 2.4 + 0.28 * max(len(combinations), 10)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_resident(left, combinations, memory)
    _draw_cost(right, combinations, bandwidth)
    figure.legend(
        handles=[
            Patch(color=color, alpha=_alpha(family), label=family.replace("_", " "))
            for family, color in _FAMILY_COLORS.items()
        ],
        fontsize=8, frameon=False, loc="outside lower left", ncols=4,
    )  # fmt: skip
    if right.lines:
        right.legend(
            fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1),
            title="x: the memory is full", title_fontsize=8,
        )  # fmt: skip
    return figure


def _draw_resident(axes: Axes, fits: Sequence[Fit], memory: int | float) -> None:
    gib = UNITS["GiB"]
    for row, item in enumerate(fits):
        start = 0.0
        for family, count in fit_families(item.size).items():
            axes.barh(
                row, count / gib, left=start / gib, height=0.72, color=_FAMILY_COLORS[family],
                alpha=_alpha(family), hatch="////" if _alpha(family) < 1 else None,
                edgecolor="white", linewidth=0,
            )  # fmt: skip
            start += count
    axes.axvline(memory / gib, color="black", linewidth=1.2)
    axes.annotate(
        f"memory {format_bytes(memory)}", (memory / gib, -0.75), xytext=(4, 0),
        textcoords="offset points", fontsize=8, va="center",
    )  # fmt: skip
    axes.set_yticks(range(len(fits)), [f"{f.size.size}  {f.size.format}" for f in fits], fontsize=8)
    axes.set_ylim(len(fits) - 0.5, -1.1)
    axes.set_xlim(0, 3 * memory / gib)  # longer bars are cut: how much too large is no question
    axes.set_xlabel("GiB")
    longest = max(item.size.context for item in fits)
    axes.set_title(f"in memory at {longest:,} positions; hatched: may stay on storage", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _alpha(family: str) -> float:
    return 0.6 if family == "per_layer_embeddings" else 1.0


def _draw_cost(axes: Axes, fits: Sequence[Fit], bandwidth: int | float | None) -> None:
    formats = list(dict.fromkeys(item.size.format for item in fits))
    for item in fits:
        longest = item.largest_context
        if longest < 1:
            continue
        contexts = np.unique(np.geomspace(min(256, longest), longest, 40).astype(int))
        moved = [traffic(item.size, context=int(n)).bytes for n in contexts]
        values = [bandwidth / m if bandwidth else m / 1e9 for m in moved]
        cut = longest < model_config(item.size.size).max_position
        axes.plot(
            contexts, values, color=_SIZE_COLORS[item.size.size],
            linestyle=_DASHES[formats.index(item.size.format) % len(_DASHES)],
            marker="x" if cut else None, markevery=[-1],
            label=f"{item.size.size} {item.size.format}",
        )  # fmt: skip
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing fits", transform=axes.transAxes, ha="center")
        axes.set_axis_off()
        return
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    axes.tick_params(labelsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("positions in the cache")
    title = f"tokens/s that {bandwidth / 1e9:g} GB/s allows at most" if bandwidth else ""
    axes.set_title(title or "GB moved per generated token", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
