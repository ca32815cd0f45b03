"""Pictures of a comparison, as matplotlib figures: for notebooks and for the report."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from gemmaqat.evaluation.context import FLOAT, ContextScores, relative_change
from gemmaqat.evaluation.results import (
    FLOAT_ARMS,
    LABELS,
    NO_RECIPE,
    OWN_KL_RECOVERY,
    QUANTIZED_ARMS,
    RECOVERING_ARMS,
    Results,
)

# Ink and lines readable on white and on black; the report turns the ink into the page's own.
INK = "#6f7680"
_GRID = "#8a919b"
# Told apart by people with any colour vision (Okabe and Ito), and by shape.
COLORS = {
    "float": "#8a919b",
    "continued": "#b08fc7",
    "ptq": "#d55e00",
    "control": "#e69f00",
    "qat": "#2f86c6",
    "distill": "#1a9e77",
}
_MARKERS = {"float": "_", "continued": "_", "ptq": "X", "control": "s", "qat": "o", "distill": "D"}

_WIDTH = 9.6  # inches, of every figure
_RECOVERIES = (-125, 145)  # percent; what lies outside is written at the edge

_STYLE: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": _GRID,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": _GRID,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
}


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    styled.__doc__, styled.__name__ = draw.__doc__, draw.__name__
    return styled


@_styled
def quality_against_bits(found: Results) -> Figure:
    """Answer perplexity by recipe, in the order of the bits of a quantized weight, per size.

    Bars are intervals of the change against the float base, paired by sequence.
    """
    sizes = list(dict.fromkeys(r["size"] for r in found.records))
    columns = min(3, len(sizes))
    rows = -(-len(sizes) // columns)
    figure = Figure(figsize=(_WIDTH, 0.6 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(sizes) :]:
        axes.set_visible(False)
    for axes, size in zip(panels.flat, sizes, strict=False):
        records = [r for r in found.records if r["size"] == size]
        base = [r["metrics"]["answer_perplexity"] for r in records if r["arm"] == "float"]
        axes.axhline(float(np.mean(base)), color=COLORS["float"], linewidth=1.2, linestyle="--")
        axes.set(title=size, yscale="log")
        axes.grid(True, axis="y", which="both")
        _arms_by_recipe(axes, [r for r in records if r["arm"] in QUANTIZED_ARMS])
        _plain_log_ticks(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel("answer perplexity")
    for axes in panels.flat[: len(sizes)]:
        axes.set_xlabel("bits of a quantized weight, scales included")
    _legend(figure, ("float", *QUANTIZED_ARMS))
    return figure


def _arms_by_recipe(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Recipes from few bits to many, each with its arms side by side."""
    bits = {r["recipe"]: r["metrics"]["quantized_bits_per_weight"] for r in records}
    recipes = sorted(bits, key=lambda name: bits[name])
    for record in records:
        side = 0.16 * (list(QUANTIZED_ARMS).index(record["arm"]) - 1.5)
        place = recipes.index(record["recipe"]) + side
        perplexity = record["metrics"]["answer_perplexity"]
        base = perplexity - record["metrics"]["answer_perplexity_change"]
        low, high = record["intervals"]["answer_perplexity_change"]
        _dot(axes, place, perplexity, (base + low, base + high), record["arm"], vertical=True)
    labels = [f"{bits[name]:.2f} bits\n{name}" for name in recipes]
    crowded = len(recipes) > 4
    axes.set_xticks(range(len(recipes)), labels, rotation=90 if crowded else 0)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(recipes) - 0.4)


@_styled
def recovery_by_size(found: Results) -> Figure:
    """How much of the PTQ damage each arm removed: in perplexity, with the control beside it, and
    in KL to the float model that is the arm's own.
    """
    groups = list(
        dict.fromkeys((r["size"], r["recipe"]) for r in found.records if r["arm"] == "ptq")
    )
    arms = RECOVERING_ARMS
    height = 1.3 + 0.24 * (len(arms) + 1) * len(groups)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    shown = (
        ("of the perplexity damage", "the float base", dict.fromkeys(arms, "recovery")),
        ("of the KL to the own float model", "that model", OWN_KL_RECOVERY),
    )
    for axes, (title, whole, metrics) in zip(panels, shown, strict=True):
        axes.axvline(0, color=_GRID, linewidth=1)
        axes.axvline(100, color=_GRID, linewidth=1, linestyle="--")
        axes.grid(True, axis="x")
        axes.set(title=title, xlabel=f"recovered, % (0: as its PTQ, 100: as {whole})")
        axes.set(xlim=_RECOVERIES, ylim=((len(arms) + 1) * len(groups) - 1, -1))
        for record in found.records:
            if record["arm"] in metrics:
                group = groups.index((record["size"], record["recipe"]))
                y = float(group * (len(arms) + 1) + arms.index(record["arm"]))
                _recovery(axes, y, record, metrics[record["arm"]])
    middle = [index * (len(arms) + 1) + (len(arms) - 1) / 2 for index in range(len(groups))]
    panels[0].set_yticks(middle, [f"{size}\n{recipe}" for size, recipe in groups])
    for axes in panels:
        axes.tick_params(axis="y", length=0)
    _legend(figure, arms)
    return figure


def _recovery(axes: Axes, y: float, record: dict[str, Any], metric: str) -> None:
    """A dot with its interval; in words where there is no number, or where it lies outside."""
    if metric not in record["metrics"]:
        axes.text(2, y, record["notes"][metric], va="center", fontsize=8)
        return
    value = 100 * record["metrics"][metric]
    interval = tuple(100 * bound for bound in record["intervals"][metric])
    _dot(axes, y, value, interval, record["arm"], vertical=False)
    left, right = _RECOVERIES
    style: Any = dict(va="bottom", fontsize=8, color=COLORS[record["arm"]], fontweight="bold")
    if value < left:
        axes.text(left + 2, y, f"◂ {value:.0f}", ha="left", **style)
    elif value > right:
        axes.text(right - 2, y, f"{value:.0f} ▸", ha="right", **style)


@_styled
def loss_curves(found: Results, size: str, seed: int) -> Figure:
    """Training losses of the base and the arms of one size, and their ends enlarged."""
    figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
    whole, ends, kl = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    base = _curve(found, (size, NO_RECIPE, "float", seed))
    base_steps = base[0][-1] if len(base[0]) else 0
    whole.plot(*base, color=COLORS["float"], linewidth=1.4)
    styles = dict(zip(_recipes(found), ("-", "--", ":", "-."), strict=False))
    for key in found.curves:
        key_size, recipe, arm, key_seed = key
        if (key_size, key_seed) != (size, seed) or arm == "float":
            continue
        steps, losses = _curve(found, key)
        line = dict(color=COLORS[arm], linewidth=1.4, linestyle=styles.get(recipe, "-"))
        if arm == "distill":
            kl.plot(base_steps + steps, losses, **line)
            continue
        for axes in (whole, ends):
            axes.plot(base_steps + steps, losses, **line)
    whole.set(title="next-token loss", xlabel="step", ylabel="nats per token", yscale="log")
    _plain_log_ticks(whole)
    ends.set(title="its end: the arms", xlabel="step")
    kl.set(title="distillation: KL to the base", xlabel="step", yscale="log")
    for axes in (whole, ends, kl):
        axes.grid(True)
    trained = [arm for arm in LABELS if any(key[2] == arm for key in found.curves)]
    _legend(figure, trained, lines=styles)
    return figure


@_styled
def layer_errors(found: Results, size: str, seed: int) -> Figure:
    """Relative RMS error of every quantized weight against its own master: layer by module."""
    rows = [r for r in found.layer_errors if (r["size"], r["seed"]) == (size, seed)]
    recipes = list(dict.fromkeys(r["recipe"] for r in rows))
    arms = ("ptq", "qat", "distill")
    modules = sorted({_module(r["layer"]) for r in rows}, key=_module_order)
    layers = sorted({_layer(r["layer"]) for r in rows})
    height = 0.9 + len(recipes) * (0.6 + 0.25 * len(modules))
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = figure.subplots(len(recipes), len(arms), squeeze=False, sharex=True, sharey=True)
    for line, recipe in zip(panels, recipes, strict=True):
        here = [r for r in rows if r["recipe"] == recipe]
        values = [100 * r["error"] for r in here]
        for axes, arm in zip(line, arms, strict=True):
            grid = np.full((len(modules), len(layers)), np.nan)
            for r in here:
                if r["arm"] == arm:
                    place = modules.index(_module(r["layer"])), layers.index(_layer(r["layer"]))
                    grid[place] = 100 * r["error"]
            image = axes.pcolormesh(
                np.ma.masked_invalid(grid), cmap="viridis", vmin=min(values), vmax=max(values)
            )
            axes.set_title(f"{recipe}: {LABELS[arm]}")
            _write_cells(axes, grid, bright=(min(values) + max(values)) / 2)
            axes.set(ylim=(len(modules), 0))  # the first module on top
            axes.set_yticks(0.5 + np.arange(len(modules)), modules, fontsize=8)
            shown = range(0, len(layers), 1 + len(layers) // 12)
            axes.set_xticks(
                0.5 + np.asarray(shown), ["-" if layers[i] < 0 else str(layers[i]) for i in shown]
            )
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        figure.colorbar(image, ax=list(line), label="error, %", shrink=0.9)
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    return figure


@_styled
def perplexity_by_cache(scores: Mapping[str, ContextScores]) -> Figure:
    """Perplexity by position through the float cache, and what every other kind changes."""
    figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
    whole, change = figure.subplots(1, 2)
    base = scores[FLOAT]
    places = np.arange(len(base.edges) - 1)
    whole.plot(places, base.perplexity, color=COLORS["float"], marker="o")
    whole.set(title=f"{FLOAT} cache", ylabel="perplexity")
    change.axhline(0, color=COLORS["float"], linewidth=1.2, linestyle="--")
    change.set(title="stored as codes", ylabel="change of perplexity, %")
    others = [name for name in scores if name != FLOAT]
    for index, name in enumerate(others):
        found = [relative_change(base, scores[name], bucket) for bucket in range(len(places))]
        value, low, high = 100 * np.array([dataclasses.astuple(one) for one in found]).T
        # Percentile intervals can lie to one side of the estimate.
        error = np.maximum([value - low, high - value], 0)
        side = 0.1 * (index - (len(others) - 1) / 2)
        color = list(COLORS.values())[2 + index]
        change.errorbar(places + side, value, error, color=color, marker="o", label=name)
    change.legend()
    labels = [f"{a}-{b - 1}" for a, b in zip(base.edges, base.edges[1:], strict=False)]
    for axes in (whole, change):
        axes.set_xticks(places, labels)
        axes.set_xlabel("position")
        axes.grid(True, axis="y")
    return figure


def _write_cells(axes: Axes, grid: np.ndarray, *, bright: float) -> None:
    """Numbers in the cells, where there is room for them."""
    if grid.shape[1] > 7:
        return
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            color = "#101418" if value > bright else "#f4f6f8"
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{value:.3g}",
                ha="center",
                va="center",
                fontsize=9,
                color=color,
            )


def _dot(
    axes: Axes,
    place: float,
    value: float,
    interval: tuple[float, float],
    arm: str,
    *,
    vertical: bool,
) -> None:
    low, high = interval
    # Percentile intervals of ratios can lie to one side of the estimate.
    error = [[max(0.0, value - low)], [max(0.0, high - value)]]
    x, y = (place, value) if vertical else (value, place)
    axes.errorbar(
        x,
        y,
        xerr=None if vertical else error,
        yerr=error if vertical else None,
        color=COLORS[arm],
        marker=_MARKERS[arm],
        markersize=6,
        linewidth=1.4,
    )


def _legend(figure: Figure, arms: Iterable[str], *, lines: dict[str, str] | None = None) -> None:
    """Arms by colour and shape; with `lines`, recipes by line style."""
    handles = []
    for arm in arms:
        shape: Any = dict(marker=_MARKERS[arm], linestyle="none")
        if lines:
            shape = dict(linestyle="-")
        elif arm in FLOAT_ARMS:
            shape = dict(linestyle="--")
        handles.append(Line2D([], [], color=COLORS[arm], label=LABELS[arm], **shape))
    for recipe, style in (lines or {}).items():
        shape = dict(linestyle=style)
        handles.append(Line2D([], [], color=INK, label=recipe, **shape))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))


def _plain_log_ticks(axes: Axes) -> None:
    """1, 2, 5, 10 in plain numbers: perplexities span less than a decade."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _recipes(found: Results) -> list[str]:
    return list(dict.fromkeys(r["recipe"] for r in found.records if r["recipe"] != NO_RECIPE))


def _curve(found: Results, key: Any) -> tuple[np.ndarray, np.ndarray]:
    """Steps and training losses of one arm; both empty for one that was not trained here."""
    points = [(r["step"], r["train/loss"]) for r in found.curves.get(key, ()) if "train/loss" in r]
    return tuple(np.asarray(points, float).reshape(-1, 2).T)  # type: ignore[return-value]


def _layer(path: str) -> int:
    """Index of the layer in a module path; -1 for modules outside the layers."""
    found = re.match(r"layers/(\d+)/", path)
    return int(found[1]) if found else -1


def _module(path: str) -> str:
    """`q_proj` of `layers/3/self_attn/q_proj`; experts keep their prefix."""
    inner = re.sub(r"^layers/\d+/", "", path)
    return re.sub(r"^(self_attn|mlp)/", "", inner)


def _module_order(module: str) -> tuple[int, str]:
    """In the order of the computation."""
    order = ("embed", "per_layer_model", "q_proj", "k_proj", "v_proj", "o_proj", "router", "gate",
             "up", "down", "experts", "per_layer")  # fmt: skip
    return next((i for i, start in enumerate(order) if module.startswith(start)), 99), module
