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
from gemmaqat.data.tokenizer import make_tokenizer
from gemmaqat.evaluation import report
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
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.rules import Table, resolve
from gemmaqat.training import checkpoint
from gemmaqat.training import workdir as workdirs
from gemmaqat.training.loop import fit
from gemmaqat.training.meter import Progress
from gemmaqat.training.start import initial_model, load_run
from gemmaqat.training.step import Programs, make_programs
from gemmaqat.typing import Params

# The arms must not see the base's own tokens again: their data are those of another seed.
ARM_SEED_OFFSET = 1_000

METHODS = {"qat": "qat", "distill": "distill"}  # arm to training method


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
    _check_recipes(experiment)
    with workdirs.lock(workdir):
        workdirs.claim(workdir, experiment=experiment, table=None, hashes={})
        scores: dict[Key, Scores] = {}
        for size in experiment.compare.sizes:
            contest = _Contest(size, experiment, workdir, progress)
            for seed in experiment.compare.seeds:
                scores |= contest.scores(seed)
        records = make_records(scores, bootstrap_samples=experiment.evaluation.bootstrap_samples)
        write_summary(workdir, records, experiment=experiment, versions=workdirs.versions())
        found = results(workdir)
        report.write(found)
    return Comparison(found, report.table(found))


def evaluate(
    config: ConfigDict | Experiment, workdir: str | Path, *, model: Gemma4 | None = None
) -> dict[str, Scores]:
    """Judges one model on the hold-out, in float and quantized.

    Args:
        config: its sections data and evaluation are used, and quantization where the model has
            no table of its own.
        workdir: gets evaluation/float and evaluation/<recipe>. The model trained there is judged,
            with its own table; where none was trained, the one that `model.checkpoint` names.
        model: to be judged instead.

    Returns:
        Scores by "float" and the recipe's name; KL and agreement are to the float model.

    Raises:
        ValueError: a bad config, or there is no model.
    """
    experiment = configs.parse(config)
    workdir = Path(workdir)
    recipe, table = experiment.quantization.recipe, None
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
    table = table or _resolve(experiment, recipe, model)
    graphdef, params = nnx.split(model)
    evaluator = Evaluator(graphdef, experiment, references=("float",))
    references = [evaluator.reference("float", params)]
    found = {"float": evaluator.score(params, references=references)}
    if table is not None:
        found[table.recipe or recipe] = evaluator.score(params, table, references=references)
    for name, scores in found.items():
        scores.save(workdir / FOLDER / name)
    return found


class _Contest:
    """All arms of one size: they share the compiled programs and the hold-out."""

    def __init__(
        self, size: str, experiment: Experiment, workdir: Path, progress: Progress | None
    ) -> None:
        self.size = size
        self.experiment = dataclasses.replace(
            experiment, model=dataclasses.replace(experiment.model, name=size)
        )
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

    def _run(self, seed: int) -> None:
        """Makes the base and what all arms share, then every arm in turn."""
        settings = self.experiment.compare
        base_experiment = self._stage(
            seed, settings.base_steps, settings.base_learning_rate, settings.base_warmup_steps
        )
        vocab_size = make_tokenizer(self.experiment.data).vocab_size
        model = initial_model(base_experiment, vocab_size=vocab_size)
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
        for arm in self._arms(model, base, continued, train):
            key = (self.size, arm.recipe, arm.name, seed)
            if self._is_judged(key):
                continue
            logging.info("%s, seed %d: judging %s %s", self.size, seed, arm.recipe, arm.name)
            found = self.evaluator.score(arm.make(), arm.table, references=references)
            found.save(arm_folder(self.workdir, *key) / FOLDER)

    def _arms(
        self, model: Gemma4, base: Params, continued: Params, train: Callable[..., Params]
    ) -> Iterator[Arm]:
        yield Arm("float", NO_RECIPE, lambda: base, None)
        yield Arm("continued", NO_RECIPE, lambda: continued, None)
        for recipe in self.experiment.compare.recipes:
            table = _resolve(self.experiment, recipe, model)
            yield Arm("ptq", recipe, lambda: base, table)
            yield Arm("control", recipe, lambda: continued, table)
            for name in METHODS:
                yield Arm(name, recipe, lambda: train(recipe, name, table), table)  # noqa: B023

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
            start_step=min(self.experiment.train.start_step, steps),
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


def _check_recipes(experiment: Experiment) -> None:
    """Resolves every recipe for every size, on shapes alone, before anything is trained."""
    for size in experiment.compare.sizes:
        model = Gemma4(model_config(size), rngs=None)
        for recipe in experiment.compare.recipes:
            if _resolve(experiment, recipe, model) is None:
                raise ValueError(
                    "config.compare.recipes: 'none' is no quantization; the float arms are always "
                    "there, name a recipe."
                )


def _resolve(experiment: Experiment, recipe: str, model: Gemma4) -> Table | None:
    if recipe == "none":
        return None
    return resolve(recipe, model, rules=experiment.quantization.rules)
