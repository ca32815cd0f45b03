"""Experiment configs: `ConfigDict` at the rim, frozen dataclasses inside.

An experiment file calls `base(size)` and changes what differs; `parse` turns the result into an
`Experiment` once, with every check across fields. Below this file nothing sees a `ConfigDict`.
"""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gemmaqat.data.config import SOURCES, DataConfig
from gemmaqat.json_file import read_json
from gemmaqat.models.config import DTYPES, REMAT_POLICIES
from gemmaqat.models.kv_codes import KV_QUANTIZATIONS
from gemmaqat.models.sizes import SIZES
from gemmaqat.quantization.recipes import RECIPES
from gemmaqat.quantization.rule import check_calibration

METHODS = ("none", "qat", "distill")
OPTIMIZERS = ("adamw", "adam", "adafactor", "sgd")
SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which model, where its parameters come from, and in which precision it computes."""

    name: str = "e2b_mini"  # one of gemmaqat.models.sizes.SIZES
    checkpoint: str = ""  # folder of published weights or a work directory; "" = random
    dtype: str = "float32"  # of the computation
    param_dtype: str = "float32"  # of the master parameters
    remat: str = "none"  # per block: none | full | dots


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """What happens to each weight. Rules are tried before the recipe; the first match wins."""

    recipe: str = "int4_channel"  # a name in gemmaqat/quantization/recipes.py; "none" = float
    rules: tuple[dict[str, Any], ...] = ()  # each the fields of a Rule
    # Where rules quantize activations:
    calibration_batches: int = 8  # of the training data, observed to find their scales
    calibration_method: str = ""  # absmax | percentile,<percent> | mse; "" = as each rule says
    learn_activation_scales: bool = False  # trained with the weights, or fixed once calibrated


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    method: str = "qat"  # none | qat (next-token loss) | distill (KL to the float teacher)
    num_steps: int = 100  # optimizer steps
    start_step: int = 0  # quantization begins at this step (delayed quantization)
    accumulation_steps: int = 1  # micro-batches per optimizer step; divides data.batch_size
    loss_chunk_tokens: int = 0  # positions whose logits exist at once; 0 = all
    log_every: int = 10  # steps between records in metrics.jsonl
    eval_every: int = 0  # steps between hold-out losses; 0 = only at the end
    eval_sequences: int = 32  # rows of the hold-out used for them
    tensorboard: bool = False  # also write TensorBoard events (extra `tensorboard`)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"  # adamw | adam | adafactor (low memory) | sgd
    learning_rate: float = 1e-3  # peak
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    warmup_steps: int = 10
    final_fraction: float = 0.05  # of the peak, reached at the last step
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0  # on matrices only (adamw)
    clip_norm: float = 1.0  # of the whole gradient; 0 = off
    state_dtype: str = "float32"  # of the first moment


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved and what is kept."""

    every_steps: int = 100  # 0 = only at the end
    keep_last: int = 2  # the one before serves where the last is damaged
    keep_best: int = 0  # by hold-out loss; needs train.eval_every


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The hold-out on which every model is judged."""

    num_sequences: int = 96  # packed rows
    batch_size: int = 16  # rows per call of the evaluation program
    items_per_task: int = 64  # exact-match items of each generated task; 0 = none
    chunk_tokens: int = 0  # positions whose logits exist at once; 0 = all
    bootstrap_samples: int = 2_000  # for intervals
    # Kinds of key/value cache to measure perplexity by position with: static | int8 | int4.
    kv_caches: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The arms of a comparison: each size, seed and recipe gets all of them."""

    sizes: tuple[str, ...] = ("e2b_mini",)
    recipes: tuple[str, ...] = ("int4_channel", "int2_channel")
    seeds: tuple[int, ...] = (0,)
    base_steps: int = 600  # float training from scratch; 0 = start from model.checkpoint
    base_learning_rate: float = 6e-3
    base_warmup_steps: int = 20
    arm_steps: int = 100  # of QAT, distillation and the float control, each
    arm_learning_rate: float = 1e-3
    arm_warmup_steps: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `gemmaqat export` makes of the trained model, unless its flags say otherwise."""

    format: str = ""  # hf | gguf | compressed-tensors | gemma-mobile | litert | orbax
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of ExportOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A whole config after `parse`: immutable and checked."""

    seed: int = 0
    model: ModelSection = ModelSection()
    data: DataConfig = DataConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    compare: CompareConfig = CompareConfig()
    export: ExportConfig = ExportConfig()


def base(size: str = "e2b_mini") -> ConfigDict:
    """The defaults of every experiment for one size, ready to be changed.

    Miniatures get the settings under which the shipped comparisons were run; full sizes get
    bfloat16 compute, rematerialised blocks, chunked losses and a small learning rate.
    """
    config = ConfigDict(dataclasses.asdict(Experiment()))
    config.model.name = size
    config.compare.sizes = (size,)
    if not size.endswith("_mini"):
        config.model.dtype = "bfloat16"
        config.model.remat = "full"
        config.data.sequence_length = 2_048
        config.train.loss_chunk_tokens = 1_024
        config.evaluation.chunk_tokens = 1_024
        config.optimizer.learning_rate = 1e-5
        config.optimizer.b2 = 0.95
        config.compare.base_steps = 0
        config.compare.arm_steps = 1_000
        config.compare.arm_learning_rate = 1e-5
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """Shrinks any experiment to seconds on a CPU, with the same recipe, rules and method.

    A recipe of one size becomes that of its miniature.
    """
    config = ConfigDict(config)
    mini = lambda name: name if name.endswith("_mini") else f"{name}_mini"  # noqa: E731
    config.model.update(name=mini(config.model.name), checkpoint="", dtype="float32", remat="none")
    if f"{config.quantization.recipe}_mini" in RECIPES:
        config.quantization.recipe += "_mini"
    config.compare.recipes = tuple(
        f"{name}_mini" if f"{name}_mini" in RECIPES else name for name in config.compare.recipes
    )
    config.data = ConfigDict(dataclasses.asdict(DataConfig(sequence_length=64, batch_size=4)))
    config.train.update(
        num_steps=2, start_step=min(config.train.start_step, 1), accumulation_steps=1, log_every=1,
        eval_every=min(config.train.eval_every, 1), eval_sequences=4, loss_chunk_tokens=0,
        tensorboard=False,
    )  # fmt: skip
    config.optimizer.warmup_steps = 1
    config.checkpoint.every_steps = 0
    config.evaluation.update(
        num_sequences=4, batch_size=4, items_per_task=4, chunk_tokens=0, bootstrap_samples=50
    )
    config.compare.update(
        sizes=tuple(dict.fromkeys(mini(s) for s in config.compare.sizes))[:1],
        seeds=config.compare.seeds[:1], base_steps=2, arm_steps=2,
        base_warmup_steps=1, arm_warmup_steps=1,
    )  # fmt: skip
    return config


def parse(config: ConfigDict | Experiment) -> Experiment:
    """Turns a `ConfigDict` into a checked `Experiment` (an `Experiment` passes through).

    Raises:
        ValueError: an unknown key, a value outside its choices, or fields that contradict each
            other; the message names the field, what was found, and the nearest name.
        TypeError: a value of the wrong type.
    """
    if isinstance(config, Experiment):
        return config
    experiment = _build(Experiment, config, prefix="")
    _check(experiment)
    return experiment


def load(path: str | Path) -> Experiment:
    """Reads the `config.json` of a work directory.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a config of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; give a work directory written by `gemmaqat train` or `compare`."
        )
    data = read_json(path, "restore it from a copy")
    version = data.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}; "
            "use the version of gemmaqat that wrote it."
        )
    return _build(Experiment, data, prefix="")


FORMAT_VERSION = 1


def to_json(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain JSON values, with a `format_version`; `load` reads it back."""
    return {"format_version": FORMAT_VERSION} | json.loads(
        json.dumps(dataclasses.asdict(experiment))
    )


def differences(left: Experiment, right: Experiment) -> list[str]:
    """Every field in which two experiments differ, as `field: left -> right`."""
    found = []
    flat_left, flat_right = _flatten(to_json(left)), _flatten(to_json(right))
    for key in sorted(flat_left.keys() | flat_right.keys()):
        if flat_left.get(key) != flat_right.get(key):
            found.append(f"{key}: {flat_left.get(key)!r} -> {flat_right.get(key)!r}")
    return found


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _build(cls: type, values: Mapping[str, Any] | ConfigDict, *, prefix: str) -> Any:
    """A frozen dataclass from a mapping, recursively; every problem names its field."""
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    built = {}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, sorted(fields), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(fields))}."
            raise ValueError(f"config.{prefix}{key}: no such field; {hint}")
        built[key] = _convert(hints[key], values[key], where=f"config.{prefix}{key}")
    return cls(**built)


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    """`value` as the type of its field: sections recursively, sequences as tuples."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, (Mapping, ConfigDict)):
            raise TypeError(f"{where}: expected a section, found {value!r}.")
        return _build(typing.cast(type, hint), value, prefix=where.removeprefix("config.") + ".")
    origin = typing.get_origin(hint)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            raise TypeError(f"{where}: expected a tuple, found {value!r}; write ({value!r},).")
        element = typing.get_args(hint)[0]
        return tuple(_convert(element, v, where=f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, (Mapping, ConfigDict)):
            raise TypeError(
                f"{where}: expected a dict, found {value!r}; on the command line write "
                "\"({'field': value},)\"."
            )
        return {key: value[key] for key in value}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(f"{where}: expected {hint.__name__}, found {value!r}.")
    return value


def _check(e: Experiment) -> None:
    """Choices, ranges and relations between fields."""
    for where, value, known in (
        ("model.name", e.model.name, SIZES),
        ("model.dtype", e.model.dtype, DTYPES),
        ("model.param_dtype", e.model.param_dtype, DTYPES),
        ("model.remat", e.model.remat, REMAT_POLICIES),
        ("data.source", e.data.source, SOURCES),
        ("train.method", e.train.method, METHODS),
        ("optimizer.name", e.optimizer.name, OPTIMIZERS),
        ("optimizer.schedule", e.optimizer.schedule, SCHEDULES),
        ("optimizer.state_dtype", e.optimizer.state_dtype, DTYPES),
        *(
            (f"evaluation.kv_caches[{i}]", s, KV_QUANTIZATIONS)
            for i, s in enumerate(e.evaluation.kv_caches)
        ),
        *((f"compare.sizes[{i}]", s, SIZES) for i, s in enumerate(e.compare.sizes)),
    ):
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "choose one of them."
            raise ValueError(f"config.{where}: {value!r} is not one of {', '.join(known)}; {hint}")
    for where, number, least in (
        ("data.sequence_length", e.data.sequence_length, 2),
        ("data.batch_size", e.data.batch_size, 1),
        ("quantization.calibration_batches", e.quantization.calibration_batches, 1),
        ("train.num_steps", e.train.num_steps, 1),
        ("train.start_step", e.train.start_step, 0),
        ("train.accumulation_steps", e.train.accumulation_steps, 1),
        ("train.log_every", e.train.log_every, 1),
        ("train.eval_every", e.train.eval_every, 0),
        ("train.eval_sequences", e.train.eval_sequences, 0),
        ("train.loss_chunk_tokens", e.train.loss_chunk_tokens, 0),
        ("optimizer.warmup_steps", e.optimizer.warmup_steps, 0),
        ("checkpoint.every_steps", e.checkpoint.every_steps, 0),
        ("checkpoint.keep_last", e.checkpoint.keep_last, 1),
        ("checkpoint.keep_best", e.checkpoint.keep_best, 0),
        ("evaluation.num_sequences", e.evaluation.num_sequences, 1),
        ("evaluation.batch_size", e.evaluation.batch_size, 1),
        ("evaluation.items_per_task", e.evaluation.items_per_task, 0),
        ("evaluation.chunk_tokens", e.evaluation.chunk_tokens, 0),
        ("evaluation.bootstrap_samples", e.evaluation.bootstrap_samples, 1),
        ("compare.base_steps", e.compare.base_steps, 0),
        ("compare.base_warmup_steps", e.compare.base_warmup_steps, 0),
        ("compare.arm_warmup_steps", e.compare.arm_warmup_steps, 0),
        ("compare.arm_steps", e.compare.arm_steps, 1),
    ):
        if number < least:
            raise ValueError(f"config.{where}: {number} is below the smallest value, {least}.")
    for where, rate in (
        ("optimizer.learning_rate", e.optimizer.learning_rate),
        ("compare.base_learning_rate", e.compare.base_learning_rate),
        ("compare.arm_learning_rate", e.compare.arm_learning_rate),
    ):
        if not 0 < rate < math.inf:
            raise ValueError(f"config.{where}: {rate} is no learning rate; it lies above 0.")
    for where, choices in (
        ("sizes", e.compare.sizes),
        ("recipes", e.compare.recipes),
        ("seeds", e.compare.seeds),
    ):
        if not choices:
            raise ValueError(f"config.compare.{where}: empty; name at least one.")
    if e.data.batch_size % e.train.accumulation_steps:
        raise ValueError(
            f"config.train.accumulation_steps: {e.train.accumulation_steps} does not divide "
            f"data.batch_size={e.data.batch_size}; choose a divisor."
        )
    if e.quantization.calibration_method:
        try:
            check_calibration(e.quantization.calibration_method)
        except ValueError as error:
            raise ValueError(f"config.quantization.calibration_method: {error}") from None
    if e.data.source == "files" and not e.data.files:
        raise ValueError(
            "config.data.files: empty while data.source='files'; name at least one "
            "dict(path='corpus/*.txt')."
        )
    if e.checkpoint.keep_best and not (e.train.eval_every and e.train.eval_sequences):
        raise ValueError(
            "config.checkpoint.keep_best: needs hold-out losses; set train.eval_every and "
            "train.eval_sequences above 0."
        )
    if e.train.method != "none" and e.train.start_step >= e.train.num_steps:
        raise ValueError(
            f"config.train.start_step: {e.train.start_step} is not below "
            f"train.num_steps={e.train.num_steps}; quantization would never begin."
        )
