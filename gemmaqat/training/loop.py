"""The one training loop: float, QAT and distillation, from any start to a saved end.

`train` builds everything from a config; `fit` takes a model and a table that exist already and is
what a comparison calls for each of its arms.
"""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from gemmaqat import config as configs
from gemmaqat.config import Experiment
from gemmaqat.data.loader import holdout, make_loader
from gemmaqat.data.tokenizer import check_vocabulary
from gemmaqat.quantization.activations import only_activations, prepare, without_activations
from gemmaqat.quantization.rules import Table, resolve
from gemmaqat.training import checkpoint
from gemmaqat.training import workdir as workdirs
from gemmaqat.training.calibration import calibrated
from gemmaqat.training.checkpoint import Checkpoints, Saved
from gemmaqat.training.distillation import Objective, make_objective
from gemmaqat.training.meter import Meter, Progress
from gemmaqat.training.nonfinite import NonFiniteError, check_finite
from gemmaqat.training.optimizer import learning_rate
from gemmaqat.training.records import METRICS, Records, read_metrics
from gemmaqat.training.start import initial_model, keep_base
from gemmaqat.training.step import (
    IN_FLOAT,
    Programs,
    QuantizeMap,
    UpdateStatus,
    make_programs,
    split_batch,
)
from gemmaqat.training.trees import flatten, hash_params, place_like, unflatten
from gemmaqat.typing import Params

_INPUTS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")


class Terminated(SystemExit):
    """SIGTERM came and the run is saved; leaves the process with status 143 (128 + SIGTERM)."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """A finished run.

    Attributes:
        params: the float master parameters after the last step.
        history: the lines of metrics.jsonl.
        steps: optimizer steps done.
    """

    params: Params
    history: list[dict[str, Any]]
    steps: int


def train(
    config: ConfigDict | Experiment, workdir: str | Path, *, progress: Progress | None = None
) -> FitResult:
    """Runs one experiment, or goes on with it where an earlier call stopped.

    Args:
        config: what to train and how.
        workdir: gets config.json, quantization.json, run.json, metrics.jsonl and checkpoints.
        progress: makes a progress bar (`tqdm.tqdm`); None logs plain lines.

    Raises:
        ValueError: a bad config, or a work directory that belongs to another one.
        NonFiniteError: a loss or gradient was no number.
        Terminated: SIGTERM came; the run is saved.
    """
    experiment = configs.parse(config)
    workdirs.check_config(Path(workdir), experiment)
    loader = make_loader(experiment.data, seed=experiment.seed)
    model = initial_model(experiment, vocab_size=loader.tokenizer.vocab_size)
    check_vocabulary(loader.tokenizer, model.config.vocab_size)
    quantized = experiment.train.method != "none" and experiment.quantization.recipe != "none"
    table = (
        resolve(
            experiment.quantization.recipe,
            model,
            rules=experiment.quantization.rules,
            calibration=experiment.quantization.calibration_method,
        )
        if quantized
        else None
    )
    return fit(
        model=only_activations(model, table),
        table=table,
        method=experiment.train.method,
        experiment=experiment,
        workdir=workdir,
        progress=progress,
        loader=loader,
    )


def fit(
    *,
    model: nnx.Module,
    table: Table | None,
    method: str,
    experiment: Experiment,
    workdir: str | Path,
    teacher: Params | None = None,
    programs: Programs | None = None,
    progress: Progress | None = None,
    initial_params: Params | None = None,
    name: str = "train",
    loader: Any = None,
    holdout_batches: list[dict[str, np.ndarray]] | None = None,
) -> FitResult:
    """Trains one arm, or goes on with it; a finished run returns at once.

    Args:
        model: structure, and the start where `initial_params` is not given. Left as it is. It
            must be prepared where `initial_params` is of a table with activations.
        table: quantization of weights and activations; None trains in float. Activations without
            a scale are calibrated on the training data at `train.start_step`.
        method: none, qat (both: next-token loss) or distill (KL to `teacher`).
        experiment: sections train, optimizer, checkpoint, data and the seed are used.
        workdir: of this run alone.
        teacher: float parameters for distill; default: the start, its activations in float.
        programs: compiled functions shared with other runs of the same structure.
        progress: makes a progress bar; None logs plain lines.
        initial_params: start from these.
        name: shown beside the progress.
        loader: training batches; default: made from `experiment.data`.
        holdout_batches: for the hold-out loss; default: made from `experiment.data`.

    Raises:
        As `train`.
    """
    experiment = dataclasses.replace(
        experiment, train=dataclasses.replace(experiment.train, method=method)
    )
    workdir = Path(workdir)
    graphdef, start = nnx.split(model if table is None else prepare(model, table))
    start = start if initial_params is None else initial_params
    if teacher is None and method == "distill":
        teacher = without_activations(start)
    programs = programs or make_programs(graphdef, experiment.train, experiment.optimizer)
    programs.check(graphdef, experiment.train, experiment.optimizer)
    loader = loader or make_loader(experiment.data, seed=experiment.seed)
    run = _Run(
        experiment=experiment,
        workdir=workdir,
        name=name,
        table=table,
        model=workdirs.model_json(model),
        programs=programs,
        objective=make_objective(method, programs, teacher),
        progress=progress,
        holdout=holdout_batches,
        tokenizer=getattr(loader, "tokenizer", None),
        checked=[*flatten(start), "the optimizer's state"],
    )
    workdirs.check_config(workdir, experiment)
    with workdirs.lock(workdir):
        hashes = {"start": hash_params(start)}
        if method == "distill":
            hashes["teacher"] = hashes["start"] if teacher is start else hash_params(teacher)
        if experiment.model.checkpoint and not (workdir / workdirs.CONFIG).exists():
            keep_base(experiment.model.checkpoint, workdir)
        workdirs.claim(workdir, experiment=experiment, table=table, hashes=hashes)
        return run.execute(start, loader)


@dataclasses.dataclass
class _State:
    """What a checkpoint holds besides the loader's position."""

    params: Params
    optimizer: Any
    rng: jax.Array  # key data; neither loss draws from it, a stochastic quantizer will
    step: int

    def arrays(self) -> dict[str, Any]:
        params, optimizer = flatten(self.params, "params/"), flatten(self.optimizer, "optimizer/")
        return params | optimizer | {"rng": self.rng}


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step on its way through the device, whose numbers nobody has looked at yet."""

    step: int
    loss: jax.Array
    status: UpdateStatus
    rate: float
    batch: dict[str, np.ndarray]


@dataclasses.dataclass
class _Run:
    """One call of `fit`."""

    experiment: Experiment
    workdir: Path
    name: str
    table: Table | None
    model: dict[str, Any]
    programs: Programs
    objective: Objective
    progress: Progress | None
    holdout: list[dict[str, np.ndarray]] | None
    tokenizer: Any
    checked: list[str]  # what each flag of `UpdateStatus.finite` is about

    def execute(self, start: Params, loader: Any) -> FitResult:
        """Restore, loop, result."""
        keep = self.experiment.checkpoint
        folder = self.workdir / checkpoint.FOLDER
        with _sigterm_noted() as terminated:
            checkpoints = Checkpoints(folder, keep_last=keep.keep_last, keep_best=keep.keep_best)
            with contextlib.closing(checkpoints):
                state = self._restore(checkpoints.latest(), start, loader)
                del start
                if state.step < self.experiment.train.num_steps:
                    self._loop(state, loader, checkpoints, terminated)
        # Whenever it came, even during the last save: whoever called must not go on.
        if terminated.is_set():
            self._leave(state.step)
        history = read_metrics(self.workdir / METRICS)
        return FitResult(params=state.params, history=history, steps=state.step)

    def _restore(self, saved: Saved | None, start: Params, loader: Any) -> _State:
        """The state to go on from: the run's own checkpoint, or a copy of the start."""
        # A copy: the update donates its parameters, and the start belongs to the caller.
        params = jax.tree.map(lambda leaf: jax.device_put(jnp.copy(leaf), leaf.sharding), start)
        rng = jax.random.key_data(jax.random.key(self.experiment.seed))
        state = _State(params, place_like(params, self.programs.init(params)), rng, step=0)
        if saved is None:
            return state
        self._check_saved(saved)
        arrays = saved.arrays(
            {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for name, leaf in state.arrays().items()
            }
        )
        loader.set_state(saved.data_state)
        logging.info("%s: going on from step %d in %s", self.name, saved.step, self.workdir)
        return _State(
            params=unflatten(state.params, arrays, "params/"),
            optimizer=unflatten(state.optimizer, arrays, "optimizer/"),
            rng=arrays["rng"],
            step=saved.step,
        )

    def _check_saved(self, saved: Saved) -> None:
        model = workdirs.plain_differences(saved.model, self.model)
        workdirs.refuse(saved.folder, "another model", model)
        table = workdirs.table_differences(saved.quantization, self.table)
        workdirs.refuse(saved.folder, "another quantization table", table)

    def _loop(
        self, state: _State, loader: Any, checkpoints: Checkpoints, terminated: threading.Event
    ) -> None:
        """Steps until the last one is saved, or the one in which SIGTERM was seen."""
        settings, keep = self.experiment.train, self.experiment.checkpoint
        with contextlib.ExitStack() as stack:
            records = Records(self.workdir, step=state.step, tensorboard=settings.tensorboard)
            stack.enter_context(contextlib.closing(records))
            meter = stack.enter_context(
                contextlib.closing(
                    Meter(self.name, records, self.progress, state.step, settings.num_steps)
                )
            )
            before: _Dispatched | None = None
            for batch in loader:
                current = self._step(state, batch)
                # The device works on this step while the host reads the numbers of the last one.
                if before is not None:
                    self._record(before, records, meter)
                before = current
                stop = terminated.is_set()
                evaluate = settings.eval_sequences > 0 and self._is_due(
                    settings.eval_every, state.step
                )
                save = stop or self._is_due(keep.every_steps, state.step)
                save = save or (evaluate and keep.keep_best > 0)
                if not (evaluate or save):
                    continue
                # First look: nothing that is not finite is ever evaluated or saved.
                self._record(current, records, meter)
                before = None
                metric = self._evaluate(state, records) if evaluate else None
                if save:
                    # Before the loader moves on, so that its state is that of this step.
                    self._save(state, loader, records, checkpoints, metric)
                if stop or state.step == settings.num_steps:
                    break

    def _is_due(self, every: int, step: int) -> bool:
        """Every so many steps (0 = never), and after the last one."""
        return step == self.experiment.train.num_steps or (every > 0 and step % every == 0)

    def _step(self, state: _State, batch: dict[str, np.ndarray]) -> _Dispatched:
        """Dispatches one optimizer step and returns before it is computed."""
        train, optimizer = self.experiment.train, self.experiment.optimizer
        table = self.table if state.step >= train.start_step else None
        if table is not None and state.step == train.start_step:
            state.params = calibrated(self.programs.graphdef, state.params, table, self.experiment)
        waits = table is None and self.table is not None and self.table.activations
        # A start may bring scales along, which neither clamp nor learn before their time.
        quantize = IN_FLOAT if waits else self._quantize_map(table)
        rate = learning_rate(optimizer, state.step, train.num_steps)
        inputs = {name: batch[name] for name in _INPUTS}
        on_device, rate_on_device = jax.device_put(
            (split_batch(inputs, train.accumulation_steps), np.float32(rate))
        )
        weights, pullback = quantize.forward(state.params)
        grads, loss = self.objective.gradients(weights, on_device)
        del weights  # the quantized copy is not needed while the optimizer runs
        grads = quantize.backward(pullback, grads)
        state.params, state.optimizer, status = self.programs.update(
            state.params, state.optimizer, grads, rate_on_device
        )
        state.step += 1
        return _Dispatched(state.step, loss, status, rate, inputs)

    def _quantize_map(self, table: Table | None) -> QuantizeMap:
        learn = self.experiment.quantization.learn_activation_scales
        return self.programs.quantize_map(table, learn_scales=learn)

    def _record(self, done: _Dispatched, records: Records, meter: Meter) -> None:
        """Fetches a step's numbers, stops the run if they are none, and writes them down."""
        status = done.status
        loss, norm, finite = jax.device_get((done.loss, status.gradient_norm, status.finite))
        check_finite(
            self.workdir,
            step=done.step,
            loss=float(loss),
            finite=finite,
            checked=self.checked,
            batch=done.batch,
        )
        every = self.experiment.train.log_every
        if done.step == 1 or self._is_due(every, done.step):
            records.metrics(
                done.step,
                {
                    "train/loss": float(loss),
                    "train/gradient_norm": float(norm),
                    "train/learning_rate": done.rate,
                },
            )
        meter.update(done.step, float(loss), int(np.sum(done.batch["segment_ids"] > 0)), every)

    def _evaluate(self, state: _State, records: Records) -> float | None:
        """Hold-out loss of the weights that would be shipped: quantized before start_step, too.

        Until then activations without scales stay float, and a loss without clamps is not to be
        compared with one with them: it is recorded, but None is returned, so it is no best.
        """
        if self.holdout is None:
            count = self.experiment.train.eval_sequences
            self.holdout = holdout(
                self.experiment.data, num_sequences=count, tokenizer=self.tokenizer
            )
        weights, _ = self._quantize_map(self.table).forward(state.params)
        batches = ({name: batch[name] for name in _INPUTS} for batch in self.holdout)
        loss = self.objective.mean(weights, batches)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"step {state.step}: hold-out loss is {loss}; nothing was saved at this step. Look "
                "at the hold-out's data, or try a lower optimizer.learning_rate."
            )
        records.metrics(state.step, {"eval/loss": loss})
        start_step = self.experiment.train.start_step
        if self.table is not None and self.table.activations and state.step <= start_step:
            return None
        return loss

    def _save(
        self,
        state: _State,
        loader: Any,
        records: Records,
        checkpoints: Checkpoints,
        metric: float | None,
    ) -> None:
        records.sync()  # a checkpoint on the disk means that the lines up to it are there, too
        checkpoints.save(
            state.step,
            state.arrays(),
            metric=metric,
            data_state=loader.get_state(),
            model=self.model,
            quantization=None if self.table is None else self.table.to_json(),
        )

    def _leave(self, step: int) -> NoReturn:
        logging.warning(
            "%s: SIGTERM; saved step %d of %d in %s. The same call with the same work directory "
            "goes on from there.",
            self.name, step, self.experiment.train.num_steps, self.workdir,
        )  # fmt: skip
        raise Terminated(128 + signal.SIGTERM)


@contextlib.contextmanager
def _sigterm_noted() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; only the main thread can listen to signals."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(signum: int, frame: FrameType | None) -> None:
        noted.set()

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, previous)
