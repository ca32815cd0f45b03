"""Where a run's model comes from, and how a finished run's model is read back."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from gemmaqat.config import Experiment
from gemmaqat.interop.base import Base, base_of, read_base, save_base
from gemmaqat.interop.load import read_config, read_float, read_shipment
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.sharding import default_sharding
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.activations import prepare
from gemmaqat.quantization.rules import Table
from gemmaqat.training import checkpoint
from gemmaqat.training.trees import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What other commands need of a run.

    Attributes:
        model: with the float master parameters; prepared, with its scales, where its table
            quantizes activations.
        table: the resolved quantization; None for a float run.
        step: optimizer steps done.
    """

    model: Gemma4
    table: Table | None
    step: int


def initial_model(experiment: Experiment, *, vocab_size: int = 0) -> Gemma4:
    """The model a run starts from.

    Args:
        experiment: names the model.
        vocab_size: of the tokenizer; a random miniature gets at least so many entries.

    Returns:
        In this order: the parameters of the work directory `model.checkpoint`, the published
        weights that `model.checkpoint` names (any format; quantized ones by their values), random
        ones from `seed`.
    """
    folder = Path(experiment.model.checkpoint)
    if experiment.model.checkpoint and (folder / checkpoint.FOLDER).is_dir():
        return load_run(folder, **_precision(experiment)).model
    if experiment.model.checkpoint:
        return read_float(folder, **_precision(experiment)).model
    config = initial_config(experiment, vocab_size=vocab_size)
    return Gemma4(config, rngs=nnx.Rngs(experiment.seed))


def initial_config(experiment: Experiment, *, vocab_size: int = 0) -> ModelConfig:
    """The configuration of `initial_model`, without its weights; same arguments."""
    name, folder = experiment.model.name, Path(experiment.model.checkpoint)
    if experiment.model.checkpoint and (folder / checkpoint.FOLDER).is_dir():
        return _saved_config(_newest(folder), **_precision(experiment))
    if experiment.model.checkpoint:
        return dataclasses.replace(read_config(folder), **_precision(experiment))
    config = model_config(name, **_precision(experiment))
    if name.endswith("_mini") and vocab_size > config.vocab_size:
        # Shapes of miniatures are ours to choose; whole multiples of the largest block.
        config = dataclasses.replace(config, vocab_size=-(-vocab_size // 128) * 128)
    return config


def keep_base(source: str | Path, folder: Path) -> None:
    """Copies what a checkpoint, or the work directory of a run from one, holds beside the model.

    Raises:
        FileNotFoundError, ValueError: the source is damaged, or has lost a part of it.
    """
    source = Path(source)
    if (source / checkpoint.FOLDER).is_dir():
        base = read_base(source) or Base(source=str(source))
    else:
        base = base_of(read_shipment(source), source)
    save_base(base, folder)


def load_run(workdir: str | Path, *, best: bool = False, **precision: Any) -> LoadedRun:
    """Model and table of a work directory's newest intact checkpoint.

    Args:
        workdir: written by `train`.
        best: take the checkpoint with the smallest hold-out loss instead.
        precision: `dtype` and `remat` that replace the saved ones.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: none is intact, or it is of a newer format.
    """
    folder = Path(workdir) / checkpoint.FOLDER
    step = checkpoint.best_step(folder) if best else None
    if step is None:
        return read_saved(_newest(Path(workdir)), **precision)
    return read_saved(checkpoint.read(checkpoint.step_folder(folder, step)), **precision)


def read_saved(saved: checkpoint.Saved, **precision: Any) -> LoadedRun:
    """Model and table of one checkpoint; arguments as in `load_run`."""
    config = _saved_config(saved, **precision)
    table = None if saved.quantization is None else Table.from_json(saved.quantization)
    model = Gemma4(config, rngs=None)
    graphdef, abstract = nnx.split(model if table is None else prepare(model, table))
    names = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=default_sharding())
        for name, leaf in flatten(abstract, "params/").items()
    }
    params = unflatten(abstract, saved.arrays(names), "params/")
    return LoadedRun(model=nnx.merge(graphdef, params), table=table, step=saved.step)


def _newest(workdir: Path) -> checkpoint.Saved:
    folder = workdir / checkpoint.FOLDER
    saved, _ = checkpoint.newest_intact(folder)
    if saved is None:
        raise FileNotFoundError(
            f"{folder}: no checkpoint; give a work directory in which training has saved one."
        )
    return saved


def _saved_config(saved: checkpoint.Saved, **precision: Any) -> ModelConfig:
    # JSON has no tuples.
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in saved.model.items()
    }
    return dataclasses.replace(ModelConfig(**fields), **precision)


def _precision(experiment: Experiment) -> dict[str, Any]:
    section = experiment.model
    return dict(dtype=section.dtype, param_dtype=section.param_dtype, remat=section.remat)
