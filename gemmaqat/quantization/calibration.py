"""Scales of static activation quantizers from data, by forward passes alone.

Observers stand at the hook points of a copy of the model; a jitted program runs it on a batch and
returns what they saw. Nothing is ever noted down while a gradient is taken. The activations seen
are unquantized: every hook point is calibrated as if it were the only one.

- `absmax[,factor]`: the mean over batches of the largest magnitude (a moving average without
  forgetting, qwix's too), times the factor, gets code 127.
- `percentile,p`: the magnitude that p percent of all elements do not exceed gets code 127.
- `mse`: of 100 ranges the one with the least squared error over all elements.

The last two read a histogram of magnitudes with 2,048 bins below the largest one of all batches.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import Array, Float

from gemmaqat.quantization import trees
from gemmaqat.quantization.activations import (
    HIGHEST,
    Model,
    prepare,
    with_scales,
    without_activations,
)
from gemmaqat.quantization.rule import check_calibration
from gemmaqat.quantization.table import SCALE, ActivationEntry, Table

Batch = Any  # keyword arguments of the model by name, or its tokens alone

BINS = 2_048
_TRIALS = np.linspace(0.01, 1.0, 100)  # fractions of the largest magnitude


def calibrate(model: Model, table: Table, batches: Iterable[Batch], *, method: str = "") -> Model:
    """A prepared model like this one, every quantizer of the table with its scale.

    Args:
        model: prepared or not; its own scales play no part. Weights are observed as they are:
            float, or on their grid after `fake_quantize`.
        table: which hook points, and how each is calibrated; constants are taken from it.
        batches: keyword arguments of the model by name (`tokens`, `positions`, ...), or arrays of
            tokens. All of one shape, or each shape is compiled.
        method: in the place of the table's own methods; "" = those.

    Raises:
        ValueError: no batch, an unknown method, or an activation that is not finite.
    """
    scales = find_scales(model, table, batches, method=method)
    return with_scales(prepare(model, table), {f"{hook}/{SCALE}": s for hook, s in scales.items()})


def find_scales(
    model: nnx.Module, table: Table, batches: Iterable[Batch], *, method: str = ""
) -> dict[str, float]:
    """Hook path to scale; arguments as in `calibrate`."""
    methods = {e.path: check_calibration(method or e.calibration) for e in table.activations}
    found = {e.path: e.constant for e in table.activations if e.constant is not None}
    observed = [e for e in table.activations if e.constant is None]
    if not observed:
        return found
    batches = list(batches)
    if not batches:
        raise ValueError("calibrate: no batch of data; give at least one.")
    model = without_activations(prepare(model, table))
    peaks = _peaks(model, observed, batches)
    with_histogram = [e for e in observed if methods[e.path][0] != "absmax"]
    histograms = _histograms(model, with_histogram, batches, peaks) if with_histogram else {}
    for entry in observed:
        name, number = methods[entry.path]
        if name == "absmax":
            reach = float(np.mean(peaks[entry.path])) * number
        elif name == "percentile":
            reach = percentile_range(histograms[entry.path], max(peaks[entry.path]), number)
        else:
            reach = least_error_range(histograms[entry.path], max(peaks[entry.path]))
        if reach == 0:
            logging.warning("%s: zero throughout the calibration data", entry.path)
        # An activation of zeros is exact under any scale; 0 itself would mean "off".
        found[entry.path] = (reach or 1.0) / HIGHEST
    return found


def percentile_range(counts: np.ndarray, peak: float, percent: float) -> float:
    """The smallest bin edge that `percent` of the elements do not exceed."""
    share = np.cumsum(counts) / np.sum(counts)
    return peak * float(np.searchsorted(share, percent / 100 - 1e-12) + 1) / len(counts)


def least_error_range(counts: np.ndarray, peak: float) -> float:
    """The range up to code 127 with the least squared error, elements at their bins' centres."""
    centres = (np.arange(len(counts)) + 0.5) * (peak / len(counts))
    steps = peak * _TRIALS / HIGHEST
    if not peak:
        return 0.0
    codes = np.minimum(np.rint(centres[None, :] / steps[:, None]), HIGHEST)
    errors = np.square(centres[None, :] - codes * steps[:, None]) @ counts
    return float(peak * _TRIALS[np.argmin(errors)])


class _Statistic(nnx.Variable):
    """What an observer saw."""


class _Peak(nnx.Module):
    """Observes the largest magnitude."""

    def __init__(self) -> None:
        self.seen = _Statistic(jnp.zeros((), jnp.float32))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
        self.seen.set_value(jnp.maximum(self.seen.get_value(), largest))
        return x


class _Histogram(nnx.Module):
    """Counts magnitudes in equal bins up to a peak."""

    def __init__(self, peak: float) -> None:
        self.peak = nnx.Variable(jnp.asarray(peak, jnp.float32))
        self.seen = _Statistic(jnp.zeros((BINS,), jnp.int32))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        peak = self.peak.get_value()
        share = jnp.abs(x).astype(jnp.float32).ravel() / jnp.where(peak == 0, 1, peak)
        bins = jnp.clip((share * BINS).astype(jnp.int32), 0, BINS - 1)
        self.seen.set_value(self.seen.get_value() + jnp.bincount(bins, length=BINS))
        return x


def _peaks(
    model: nnx.Module, entries: list[ActivationEntry], batches: list[Batch]
) -> dict[str, list[float]]:
    """Hook path to the largest magnitude in each batch."""
    observed = _observe(model, {entry.path: _Peak() for entry in entries}, batches)
    peaks = {path: [float(value) for value in values] for path, values in observed.items()}
    for path, values in peaks.items():
        if not np.all(np.isfinite(values)):
            raise ValueError(
                f"calibrate: the activation at {path} is not finite; check the weights and data."
            )
    return peaks


def _histograms(
    model: nnx.Module,
    entries: list[ActivationEntry],
    batches: list[Batch],
    peaks: Mapping[str, list[float]],
) -> dict[str, np.ndarray]:
    """Hook path to the counts of all batches together."""
    observers = {entry.path: _Histogram(max(peaks[entry.path])) for entry in entries}
    observed = _observe(model, observers, batches)
    return {path: np.stack(values).sum(axis=0) for path, values in observed.items()}


def _observe(
    model: nnx.Module, observers: Mapping[str, nnx.Module], batches: list[Batch]
) -> dict[str, list[np.ndarray]]:
    """Hook path to what was seen there in each batch."""
    model = trees.with_modules(model, observers)
    graph, state = nnx.split(model)
    found: dict[str, list[np.ndarray]] = {path: [] for path in observers}
    for batch in batches:
        for path, seen in jax.device_get(_run(graph, state, batch)).items():
            found[path].append(np.asarray(seen))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _run(graph: nnx.GraphDef, state: Any, batch: Batch) -> dict[str, Array]:
    model: Any = nnx.merge(graph, state)
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch)
    seen = nnx.to_flat_state(nnx.state(model, _Statistic))
    return {"/".join(map(str, keys[:-1])): leaf.get_value() for keys, leaf in seen}
