"""The loop: resuming, refusing, stopping, recording. Bit-exact resume under kills: kill_test."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from gemmaqat import config as configs
from gemmaqat.data.loader import make_loader
from gemmaqat.quantization.rules import Table, resolve
from gemmaqat.training import start
from gemmaqat.training.checkpoint import Checkpoints
from gemmaqat.training.loop import Terminated, train
from gemmaqat.training.nonfinite import NonFiniteError, check_finite
from gemmaqat.training.records import Records, read_metrics
from gemmaqat.training.trees import flatten, hash_params


class Interrupting:
    """A loader that does something before it gives its n-th batch."""

    def __init__(self, loader, at, action):
        self.loader, self.at, self.action, self.given = loader, at, action, 0
        self.get_state, self.set_state = loader.get_state, loader.set_state
        self.tokenizer = loader.tokenizer

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.loader)
        self.given += 1
        return self.action(batch) if self.given == self.at else batch


@pytest.fixture(scope="module")
def interrupting(experiment):
    def interrupting(at, action):
        return Interrupting(make_loader(experiment().data, seed=0), at, action)

    return interrupting


@pytest.fixture(scope="module")
def finished(run, experiment, tmp_path_factory):
    """An uninterrupted run: (work directory, result)."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, run(workdir, experiment())


def _files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_learns_and_leaves_its_records(finished):
    workdir, result = finished
    losses = [line["train/loss"] for line in result.history]
    assert losses[-1] < losses[0] - 0.1
    assert [line["step"] for line in result.history] == list(range(1, 9))
    assert set(result.history[0]) == {
        "step", "train/loss", "train/gradient_norm", "train/learning_rate",
    }  # fmt: skip
    about = json.loads((workdir / "run.json").read_text())
    assert {"versions", "devices", "seeds", "hashes"} <= set(about)
    assert configs.load(workdir / "config.json").train.num_steps == 8
    assert json.loads((workdir / "quantization.json").read_text())
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["00000006", "00000008"]


def test_a_finished_run_returns_at_once_and_changes_nothing(finished, run, experiment):
    workdir, result = finished
    before = _files(workdir)
    again = run(workdir, experiment(), loader=make_loader(experiment().data, seed=0))
    assert hash_params(again.params) == hash_params(result.params)
    assert again.history == result.history
    assert _files(workdir) == before


def test_the_start_is_left_as_it_was(finished, model, run, experiment):
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.split(model)[1]))


def test_sigterm_saves_says_how_to_go_on_and_the_run_ends_the_same(
    finished, run, experiment, interrupting, tmp_path, caplog
):
    def terminate(batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with caplog.at_level("WARNING", logger="absl"), pytest.raises(Terminated) as exit_:
        run(tmp_path / "run", experiment(), loader=interrupting(5, terminate))
    assert exit_.value.code == 128 + signal.SIGTERM
    assert "saved step 5 of 8" in caplog.text and "goes on from there" in caplog.text
    assert (tmp_path / "run/checkpoints/00000005").is_dir()
    result = run(tmp_path / "run", experiment())
    assert hash_params(result.params) == hash_params(finished[1].params)
    assert result.history == finished[1].history


def test_sigterm_during_the_last_save_is_not_swallowed(run, experiment, tmp_path, monkeypatch):
    commit = Checkpoints._finish

    def terminated_commit(self, draft, step):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        commit(self, draft, step)

    monkeypatch.setattr(Checkpoints, "_finish", terminated_commit)
    earlier = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("met the caller's handler"))
    try:
        with pytest.raises(Terminated):
            run(tmp_path / "run", experiment())
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert (tmp_path / "run/checkpoints/00000008").is_dir()
    assert run(tmp_path / "run", experiment()).steps == 8


def test_a_crash_between_saves_is_resumed_bit_by_bit(
    finished, run, experiment, interrupting, tmp_path
):
    def crash(batch):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "run", experiment(), loader=interrupting(6, crash))
    # Lines beyond the checkpoint of step 3, and a torn one, as a killed process leaves them.
    metrics, timing = tmp_path / "run/metrics.jsonl", tmp_path / "run/timing.jsonl"
    assert read_metrics(metrics)[-1]["step"] > 3
    with metrics.open("a") as file:
        file.write('{"step": 6, "train/lo')
    result = run(tmp_path / "run", experiment())
    assert hash_params(result.params) == hash_params(finished[1].params)
    assert metrics.read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()
    # Each call's first step pays for compilation: it has no rate.
    assert [line["step"] for line in read_metrics(timing)] == [2, 3, 5, 6, 7, 8]


def test_a_directory_of_another_config_is_refused_with_nothing_lost(finished, run, experiment):
    workdir, _ = finished
    before = _files(workdir)
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.003 -> 0\.001"):
        run(workdir, experiment(optimizer=dict(learning_rate=1e-3)))
    assert _files(workdir) == before


def test_another_table_is_refused_with_the_difference(finished, run, model, experiment):
    workdir, _ = finished
    before = _files(workdir)
    with pytest.raises(ValueError, match=r"another quantization table.*q_proj"):
        run(workdir, experiment(), table=resolve("int4_channel", model))
    assert _files(workdir) == before


def test_a_checkpoint_of_another_table_is_refused(finished, run, model, experiment, tmp_path):
    other = resolve("int4_channel", model)
    run(tmp_path / "run", experiment(), table=other)
    # The directory says int4, the checkpoint put into it was trained for int2.
    shutil.rmtree(tmp_path / "run/checkpoints")
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "run/checkpoints")
    with pytest.raises(ValueError, match=r"00000008: belongs to another quantization table"):
        run(tmp_path / "run", experiment(), table=other)


def test_other_starting_parameters_are_refused(run, model, experiment, tmp_path):
    params = nnx.split(model)[1]
    run(tmp_path / "run", experiment(), initial_params=params)
    with pytest.raises(ValueError, match=r"from other parameters.*start"):
        run(tmp_path / "run", experiment(), initial_params=jax.tree.map(lambda p: p * 2, params))


def test_a_run_rests_on_its_model_and_teacher(run, model, experiment, tmp_path):
    graphdef, params = nnx.split(model)
    other = nnx.merge(graphdef, jax.tree.map(lambda p: p * 2, params))
    run(tmp_path / "run", experiment(), method="distill")
    with pytest.raises(ValueError, match=r"from other parameters.*start: .*; teacher: "):
        run(tmp_path / "run", experiment(), method="distill", model=other)


def test_two_processes_cannot_work_in_one_directory(finished, run, experiment, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    hold = (
        "import pathlib, sys; from gemmaqat.training import workdir\n"
        f"with workdir.lock(pathlib.Path({str(workdir)!r})): print(); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", hold],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as other:  # fmt: skip
        other.stdout.readline()
        before = _files(workdir)
        with pytest.raises(ValueError, match=r"run: another process is working here; wait"):
            run(workdir, experiment())
        assert _files(workdir) == before
        other.kill()
    assert run(workdir, experiment()).steps == 8


def test_records_reach_the_disk_before_the_checkpoint_that_counts_on_them(
    run, experiment, tmp_path, monkeypatch
):
    events, sync, save = [], Records.sync, Checkpoints.save
    synced = lambda self: (sync(self), events.append("sync"))  # noqa: E731
    monkeypatch.setattr(Records, "sync", synced)

    def saved(self, step, *args, **kwargs):
        events.append(step)
        save(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", saved)
    run(tmp_path / "run", experiment())
    assert events == ["sync", 3, "sync", 6, "sync", 8]


def test_files_of_unknown_origin_are_not_overwritten(run, experiment, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(ValueError, match=r"holds metrics\.jsonl but no config\.json"):
        run(tmp_path, experiment())
    assert _files(tmp_path) == {"metrics.jsonl": b"precious\n"}


def test_a_non_finite_step_stops_the_run_and_keeps_its_batch(
    run, experiment, interrupting, tmp_path
):
    def poison(batch):
        return batch | {"loss_weights": batch["loss_weights"] * np.float32("nan")}

    with pytest.raises(NonFiniteError, match=r"step 5: loss is nan.*embed_tokens/weight"):
        run(tmp_path / "run", experiment(), loader=interrupting(5, poison))
    found = json.loads((tmp_path / "run/nonfinite/step_00000005.json").read_text())
    assert "layers/0/mlp/down_proj/weight" in found["not_finite"]
    batch = np.load(tmp_path / "run/nonfinite/step_00000005.npz")
    assert np.isnan(batch["loss_weights"]).all() and batch["tokens"].shape == (4, 64)
    # The last healthy checkpoint stays the newest, and no line records the bad step.
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["00000003"]
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == 4


def test_a_loss_alone_that_is_no_number_is_said_so(tmp_path):
    with pytest.raises(NonFiniteError, match="loss is nan, every gradient is finite; the batch"):
        check_finite(
            tmp_path, step=3, loss=float("nan"), finite=np.ones(1, bool), checked=["w"], batch={}
        )


def test_a_delayed_start_is_float_before_and_quantized_after(finished, run, experiment, tmp_path):
    delayed = run(tmp_path / "delayed", experiment(train=dict(start_step=4))).history
    float_ = run(tmp_path / "float", experiment(), table=None, method="none").history
    assert delayed[:4] == float_[:4]
    assert delayed[4]["train/loss"] > float_[4]["train/loss"]
    assert finished[1].history[0]["train/loss"] != float_[0]["train/loss"]


def test_distillation_starts_from_its_teacher(run, experiment, tmp_path):
    history = run(tmp_path / "float", experiment(), table=None, method="distill").history
    assert abs(history[0]["train/loss"]) < 1e-5  # KL of a model to itself, float32
    history = run(tmp_path / "int2", experiment(), method="distill").history
    assert history[-1]["train/loss"] < history[0]["train/loss"]


def test_the_best_checkpoint_is_that_of_the_smallest_hold_out_loss(run, experiment, tmp_path):
    config = experiment(
        train=dict(eval_every=2, eval_sequences=4),
        checkpoint=dict(every_steps=0, keep_last=1, keep_best=1),
        optimizer=dict(learning_rate=0.3, schedule="constant"),  # goes astray after a while
    )
    history = run(tmp_path / "run", config).history
    holdout = {line["step"]: line["eval/loss"] for line in history if "eval/loss" in line}
    assert sorted(holdout) == [2, 4, 6, 8]
    kept = {int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {8, min(holdout, key=holdout.get)}


def test_progress_goes_to_the_bar_that_was_passed(run, experiment, tmp_path):
    class Bar:
        def __init__(self, **options):
            self.options, self.count, self.closed = options, 0, False
            bars.append(self)

        def update(self, n):
            self.count += n

        def set_postfix(self, **values):
            self.shown = values

        def close(self):
            self.closed = True

    bars = []
    run(tmp_path / "run", experiment(), progress=Bar, name="arm")
    (bar,) = bars
    assert bar.options == dict(total=8, initial=0, desc="arm", unit="step")
    assert (bar.count, bar.closed) == (8, True)


def test_tensorboard_gets_what_the_records_get(run, experiment, tmp_path):
    pytest.importorskip("tensorboardX", reason="extra `tensorboard` not installed")
    run(tmp_path / "run", experiment(train=dict(tensorboard=True)))
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    assert b"train/gradient_norm" in events.read_bytes()


def test_train_builds_everything_from_a_config_and_the_run_can_be_read_back(tmp_path):
    config = configs.tiny(configs.base("12b_mini"))
    config.train.update(num_steps=1)
    result = train(config, tmp_path / "run")
    loaded = start.load_run(tmp_path / "run")
    assert loaded.step == 1
    assert hash_params(nnx.split(loaded.model)[1]) == hash_params(result.params)
    saved_table = Table.from_json(json.loads((tmp_path / "run/quantization.json").read_text()))
    assert loaded.table.quantized and loaded.table.diff(saved_table) == []
    # A second run starts from the first one's parameters.
    config.model.checkpoint = str(tmp_path / "run")
    again = start.initial_model(configs.parse(config))
    assert flatten(nnx.split(again)[1]).keys() == flatten(result.params).keys()
    assert hash_params(nnx.split(again)[1]) == hash_params(result.params)
    with pytest.raises(ValueError, match=r"model\.checkpoint"):
        train(config, tmp_path / "run")


def test_a_directory_without_a_checkpoint_is_said_to_have_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        start.load_run(tmp_path)
