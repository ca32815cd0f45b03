"""Activation scales of a run: found once, on its own training data, before quantized steps.

The weights stand on their grid while the activations are observed, as they will wherever the
scales are used. Round to nearest and QAT thus start from the same scales.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from gemmaqat.config import Experiment
from gemmaqat.data.loader import make_loader
from gemmaqat.quantization.activations import activation_scales, with_scales
from gemmaqat.quantization.calibration import calibrate
from gemmaqat.quantization.fake import fake_quantize
from gemmaqat.quantization.rules import Table
from gemmaqat.typing import Params

_INPUTS = ("tokens", "positions", "segment_ids")


def calibrated(
    graphdef: nnx.GraphDef, params: Params, table: Table, experiment: Experiment
) -> Params:
    """The parameters with a scale at every hook point of the table; those that have one keep it.

    Args:
        graphdef: structure of the prepared model.
        params: of a prepared model, float.
        table: its weights' grids and its activations.
        experiment: the first `quantization.calibration_batches` of its training data are observed.

    Raises:
        ValueError: an activation is not finite.
    """
    scales = jax.device_get(activation_scales(params))
    missing = {path for path in table.activation_scales if scales[path] == 0}
    if not missing:
        return params
    settings = experiment.quantization
    batches = []
    if table.calibrated:
        loader = make_loader(experiment.data, seed=experiment.seed)
        batches = [
            {name: jnp.asarray(batch[name]) for name in _INPUTS}
            for batch in itertools.islice(loader, settings.calibration_batches)
        ]
    model = nnx.merge(graphdef, fake_quantize(params, table))
    found = activation_scales(calibrate(model, table, batches))
    return with_scales(params, {path: found[path] for path in missing})
