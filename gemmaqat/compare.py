"""The fair fight: makes the arms of a comparison and judges them all alike.

For every size and seed a float base is trained. Every arm starts from it, sees the same tokens in
the same order, and ends as the same kind of thing: float master parameters and the table that
says how they are quantized. One loop judges them on one hold-out with one program.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from gemmaqat import config as configs
from gemmaqat.config import Experiment
from gemmaqat.data.tokenizer import check_vocabulary, make_tokenizer
from gemmaqat.evaluation import context, report
from gemmaqat.evaluation.evaluate import FOLDER, METRICS, Evaluator, Scores
from gemmaqat.evaluation.results import (
    NO_RECIPE,
    Key,
    Results,
    arm_folder,
    make_records,
    results,
    write_summary,
)
from gemmaqat.interop.hashes import contents_sha256
from gemmaqat.interop.source import of_model
from gemmaqat.json_file import read_json
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.activations import prepare, without_activations
from gemmaqat.quantization.convert import convert_params, dequantize_params, is_packed
from gemmaqat.quantization.rules import Table, resolve
from gemmaqat.training import checkpoint
from gemmaqat.training import workdir as workdirs
from gemmaqat.training.calibration import calibrated
from gemmaqat.training.loop import fit
from gemmaqat.training.meter import Progress
from gemmaqat.training.start import initial_config, initial_model, load_run
from gemmaqat.training.step import Programs, make_programs
from gemmaqat.typing import Params

# The arms must not see the base's own tokens again: their data are those of another seed.
ARM_SEED_OFFSET = 1_000

METHODS = {"qat": "qat", "distill": "distill"}  # arm to training method

# Of a model's configuration, what may differ between a checkpoint and the size it is given as.
_NOT_SHAPE = {
    "name", "vocab_size", "max_position", "pad_id", "eos_id", "bos_id", "stop_ids",
    "dtype", "param_dtype", "remat",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found: the results, and their table, which is also its text."""

    results: Results
    table: str

    def __str__(self) -> str:
        return self.table


@dataclasses.dataclass(frozen=True)
class Arm:
    """One contestant: how its float master parameters are made, and how they are quantized."""

    name: str
    recipe: str
    make: Callable[[], Params]
    table: Table | None


def compare(
    config: ConfigDict | Experiment, workdir: str | Path, *, progress: Progress | None = None
) -> Comparison:
    """Trains, quantizes and judges every arm for every size, seed and recipe.

    What is finished in `workdir` is not done again; an interrupted comparison goes on.

    Args:
        config: its section `compare` says which sizes, recipes and seeds.
        workdir: gets summary.json, report.md, report.html, and a work directory per arm.
        progress: makes a progress bar (`tqdm.tqdm`); None logs plain lines.

    Raises:
        ValueError: a bad config, or a work directory that belongs to another one.
    """
    experiment = configs.parse(config)
    workdir = Path(workdir)
    workdirs.check_config(workdir, experiment)
    check(experiment)
    # A claimed directory has passed; what is finished there is read without its checkpoint.
    if not (workdir / workdirs.CONFIG).exists():
        _check_models(experiment)
    with workdirs.lock(workdir):
        workdirs.claim(workdir, experiment=experiment, table=None, hashes={})
        scores: dict[Key, Scores] = {}
        tables: dict[tuple[str, str], Table] = {}
        for size in experiment.compare.sizes:
            contest = _Contest(size, experiment, workdir, progress)
            for seed in experiment.compare.seeds:
                scores |= contest.scores(seed)
            tables |= contest.tables()
        records = make_records(
            scores, tables=tables, bootstrap_samples=experiment.evaluation.bootstrap_samples
        )
        write_summary(workdir, records, experiment=experiment, versions=workdirs.versions())
        found = results(workdir)
        report.write(found)
    return Comparison(found, report.table(found))


def check(config: ConfigDict | Experiment) -> None:
    """Whether the settings make a comparison; reads no file.

    Raises:
        ValueError: they do not, and why.
    """
    experiment = configs.parse(config)
    settings, start_step = experiment.compare, experiment.train.start_step
    if start_step >= settings.arm_steps:
        raise ValueError(
            f"config.train.start_step: {start_step} is not below "
            f"compare.arm_steps={settings.arm_steps}; the arms would train in float throughout."
        )
    if not settings.base_steps and not experiment.model.checkpoint:
        raise ValueError(
            "config.compare.base_steps: 0 while model.checkpoint is empty; train a base, or name "
            "a folder of weights: random ones have nothing to lose."
        )
    if experiment.model.checkpoint and len(settings.sizes) != 1:
        raise ValueError(
            f"config.compare.sizes: {settings.sizes} while model.checkpoint names one model; give "
            "its size alone."
        )
    if experiment.evaluation.kv_caches:
        raise ValueError(
            f"config.evaluation.kv_caches: {experiment.evaluation.kv_caches} is for one model; "
            "leave it empty to compare, and run `gemmaqat evaluate` on a finished arm with it."
        )
    if "none" in settings.recipes:
        raise ValueError(
            "config.compare.recipes: 'none' is no quantization; the float arms are always there, "
            "name a recipe."
        )


def evaluate(
    config: ConfigDict | Experiment,
    workdir: str | Path,
    *,
    model: Gemma4 | None = None,
    table: Table | None = None,
) -> dict[str, Scores]:
    """Judges one model on the hold-out, in float and quantized.

    Args:
        config: its sections data and evaluation are used, and quantization where the model has
            no table of its own.
        workdir: gets evaluation/float and evaluation/<recipe>. The model trained there is judged,
            with its own table; where none was trained, the one that `model.checkpoint` names. With
            `evaluation.kv_caches` the last also gets context.json, perplexity by position through
            each kind of cache.
        model: to be judged instead; one with packed weights by its codes as they are.
        table: of that model, where it has one of its own.

    Returns:
        Scores by "float" and the recipe's name; KL and agreement are to the float model, which for
        packed weights is their values without quantized activations.

    Raises:
        ValueError: a bad config, or there is no model.
    """
    experiment = configs.parse(config)
    workdir = Path(workdir)
    recipe = experiment.quantization.recipe
    if model is None and (workdir / checkpoint.FOLDER).is_dir():
        run = load_run(workdir, dtype=experiment.model.dtype, remat=experiment.model.remat)
        model, table = run.model, run.table
    elif model is None:
        if not experiment.model.checkpoint:
            raise ValueError(
                f"{workdir}: no trained model there and config.model.checkpoint is empty; train "
                "first, or name a folder of weights."
            )
        model = initial_model(experiment)
    check_vocabulary(make_tokenizer(experiment.data), model.config.vocab_size)
    table = table or _resolve(experiment, recipe, model)
    graphdef, params = nnx.split(model if table is None else prepare(model, table))
    evaluator = Evaluator(graphdef, experiment, references=("float",))
    as_float = without_activations(dequantize_params(params))
    references = [evaluator.reference("float", as_float)]
    found = {"float": evaluator.score(as_float, references=references)}
    if table is not None:
        if not is_packed(params):
            params = calibrated(graphdef, params, table, experiment)
        scores = evaluator.score(params, table, references=references)
        packed = params if is_packed(params) else convert_params(params, table)
        contents = contents_sha256(of_model(nnx.merge(graphdef, packed), table))
        found[table.recipe or recipe] = dataclasses.replace(scores, contents_sha256=contents)
    for name, scores in found.items():
        scores.save(workdir / FOLDER / name)
    if experiment.evaluation.kv_caches:
        weights = params if table is None else dequantize_params(packed)
        caches = context.compare_caches(
            nnx.merge(graphdef, weights), evaluator.holdout, experiment.evaluation.kv_caches
        )
        context.save(workdir / FOLDER / list(found)[-1], caches)
    return found


class _Contest:
    """All arms of one size: they share the compiled programs and the hold-out."""

    def __init__(
        self, size: str, experiment: Experiment, workdir: Path, progress: Progress | None
    ) -> None:
        self.size = size
        self.experiment = _of_size(experiment, size)
        self.workdir = workdir
        self.progress = progress
        self.programs: Programs | None = None
        self.evaluator: Evaluator | None = None

    def scores(self, seed: int) -> dict[Key, Scores]:
        """The scores of all arms of one seed, from files where they are finished."""
        settings = self.experiment.compare
        keys = [(self.size, NO_RECIPE, arm, seed) for arm in ("float", "continued")]
        for recipe in settings.recipes:
            keys += [(self.size, recipe, arm, seed) for arm in ("ptq", "control", *METHODS)]
        if not all(self._is_judged(key) for key in keys):
            self._run(seed)
        return {key: Scores.load(arm_folder(self.workdir, *key) / FOLDER) for key in keys}

    def tables(self) -> dict[tuple[str, str], Table]:
        """Size and recipe to what it did to every weight, from the files of a trained arm."""
        settings, found = self.experiment.compare, {}
        for recipe in settings.recipes:
            folder = arm_folder(self.workdir, self.size, recipe, "qat", settings.seeds[0])
            saved = read_json(folder / workdirs.QUANTIZATION, "restore it from a copy")
            found[self.size, recipe] = Table.from_json(saved)
        return found

    def _run(self, seed: int) -> None:
        """Makes the base and what all arms share, then every arm in turn."""
        settings = self.experiment.compare
        base_experiment = self._stage(
            seed, settings.base_steps, settings.base_learning_rate, settings.base_warmup_steps
        )
        vocab_size = make_tokenizer(self.experiment.data).vocab_size
        model = without_activations(initial_model(base_experiment, vocab_size=vocab_size))
        # Quantizers of all recipes, off where an arm has none there: one structure, one program.
        for recipe in settings.recipes:
            model = prepare(model, self._table(recipe, model))
        graphdef, start = nnx.split(model)
        self.programs = self.programs or make_programs(
            graphdef, base_experiment.train, base_experiment.optimizer
        )
        self.evaluator = self.evaluator or Evaluator(
            graphdef, self.experiment, references=("base", "continued")
        )

        base = start
        if settings.base_steps:
            base = self._fit(model, base_experiment, (self.size, NO_RECIPE, "float", seed))
        arm_experiment = self._stage(
            seed + ARM_SEED_OFFSET,
            settings.arm_steps,
            settings.arm_learning_rate,
            settings.arm_warmup_steps,
        )
        train = lambda recipe, arm, table=None: self._fit(  # noqa: E731
            model, arm_experiment, (self.size, recipe, arm, seed), start=base, table=table
        )
        continued = train(NO_RECIPE, "continued")
        references = [
            self.evaluator.reference("base", base),
            self.evaluator.reference("continued", continued),
        ]
        calibrate = lambda params, table: calibrated(  # noqa: E731
            graphdef, params, table, arm_experiment
        )
        for arm in self._arms(model, base, continued, train, calibrate):
            key = (self.size, arm.recipe, arm.name, seed)
            if self._is_judged(key):
                continue
            logging.info("%s, seed %d: judging %s %s", self.size, seed, arm.recipe, arm.name)
            found = self.evaluator.score(arm.make(), arm.table, references=references)
            found.save(arm_folder(self.workdir, *key) / FOLDER)

    def _arms(
        self,
        model: Gemma4,
        base: Params,
        continued: Params,
        train: Callable[..., Params],
        calibrate: Callable[[Params, Table], Params],
    ) -> Iterator[Arm]:
        yield Arm("float", NO_RECIPE, lambda: base, None)
        yield Arm("continued", NO_RECIPE, lambda: continued, None)
        for recipe in self.experiment.compare.recipes:
            table = self._table(recipe, model)
            yield Arm("ptq", recipe, lambda: calibrate(base, table), table)  # noqa: B023
            yield Arm("control", recipe, lambda: calibrate(continued, table), table)  # noqa: B023
            for name in METHODS:
                yield Arm(name, recipe, lambda: train(recipe, name, table), table)  # noqa: B023

    def _table(self, recipe: str, model: Gemma4) -> Table:
        section = self.experiment.quantization
        return resolve(recipe, model, rules=section.rules, calibration=section.calibration_method)

    def _fit(
        self,
        model: Gemma4,
        experiment: Experiment,
        key: Key,
        *,
        start: Params | None = None,
        table: Table | None = None,
    ) -> Params:
        """Trains one stage in its own work directory, or reads it back if it is finished."""
        _, recipe, arm, seed = key
        method = METHODS.get(arm, "none")
        experiment = dataclasses.replace(
            experiment,
            quantization=dataclasses.replace(experiment.quantization, recipe=recipe),
        )
        return fit(
            model=model,
            table=table,
            method=method,
            experiment=experiment,
            workdir=arm_folder(self.workdir, *key),
            teacher=start if method == "distill" else None,
            programs=self.programs,
            progress=self.progress,
            initial_params=start,
            name=f"{self.size}/seed{seed}/{arm}" + (f"/{recipe}" if table else ""),
        ).params

    def _stage(self, seed: int, steps: int, learning_rate: float, warmup: int) -> Experiment:
        """The experiment of one stage of training."""
        train = dataclasses.replace(
            self.experiment.train,
            num_steps=max(1, steps),
            # Arms are judged below: a hold-out loss of their own would be one more compilation.
            eval_sequences=self.experiment.train.eval_sequences
            if self.experiment.train.eval_every
            else 0,
        )
        optimizer = dataclasses.replace(
            self.experiment.optimizer, learning_rate=learning_rate, warmup_steps=warmup
        )
        return dataclasses.replace(self.experiment, seed=seed, train=train, optimizer=optimizer)

    def _is_judged(self, key: Key) -> bool:
        return (arm_folder(self.workdir, *key) / FOLDER / METRICS).is_file()


def _check_models(experiment: Experiment) -> None:
    """Every size against its checkpoint, tokenizer and recipes, on shapes alone."""
    tokenizer = make_tokenizer(experiment.data)
    for size in experiment.compare.sizes:
        config = initial_config(_of_size(experiment, size), vocab_size=tokenizer.vocab_size)
        _check_shape(config, size, where=experiment.model.checkpoint)
        check_vocabulary(tokenizer, config.vocab_size)
        model = Gemma4(config, rngs=None)
        for recipe in experiment.compare.recipes:
            _resolve(experiment, recipe, model)


def _check_shape(config: ModelConfig, size: str, *, where: str) -> None:
    """Refuses a checkpoint that is not of the size under whose name it would be reported."""
    found, wanted = (dataclasses.asdict(c) for c in (config, model_config(size)))
    differing = [
        f"{name}={found[name]} for {wanted[name]}"
        for name in wanted
        if name not in _NOT_SHAPE and found[name] != wanted[name]
    ]
    if differing:
        raise ValueError(
            f"{where}: not a {size}, it has {', '.join(differing[:3])}; give its own size in "
            "config.compare.sizes."
        )


def _of_size(experiment: Experiment, size: str) -> Experiment:
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, name=size))


def _resolve(experiment: Experiment, recipe: str, model: Gemma4) -> Table | None:
    if recipe == "none" and not experiment.quantization.rules:
        return None
    section = experiment.quantization
    return resolve(recipe, model, rules=section.rules, calibration=section.calibration_method)
