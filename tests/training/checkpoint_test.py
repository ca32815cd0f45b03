"""Checkpoints: what comes back is what was saved, or is named as damaged."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gemmaqat.training import checkpoint
from gemmaqat.training.checkpoint import Checkpoints

ABOUT = dict(metric=None, data_state={"at": 3}, model={"width": 4}, quantization=None)


def _arrays(value):
    return {
        "params/layers/0/weight": jnp.full((300, 200), value),
        "optimizer/0/count": jnp.int32(7),
    }


def _abstract(arrays):
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in arrays.items()
    }


@pytest.fixture
def open_checkpoints(tmp_path):
    opened = []

    def open_(keep_last=2, keep_best=0):
        opened.append(Checkpoints(tmp_path / "c", keep_last=keep_last, keep_best=keep_best))
        return opened[-1]

    yield open_
    for checkpoints in opened:
        checkpoints.close()


@pytest.fixture
def two_steps(open_checkpoints):
    checkpoints = open_checkpoints()
    for step in (10, 20):
        checkpoints.save(step, _arrays(float(step)), **ABOUT)
    checkpoints.wait()
    return checkpoints


def test_what_was_saved_comes_back(two_steps):
    saved = two_steps.latest()
    assert (saved.step, saved.data_state, saved.model) == (20, {"at": 3}, {"width": 4})
    arrays = saved.arrays(_abstract(_arrays(0.0)))
    assert (arrays["params/layers/0/weight"] == 20).all()
    assert arrays["optimizer/0/count"] == 7


def test_a_relative_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(Checkpoints(Path("runs/a"), keep_last=1, keep_best=0)) as checkpoints:
        checkpoints.save(1, _arrays(1.0), **ABOUT)
    saved, _ = checkpoint.newest_intact(Path("runs/a"))
    assert (saved.arrays(_abstract(_arrays(0.0)))["params/layers/0/weight"] == 1).all()
    assert saved.folder == tmp_path / "runs/a/00000001"


def test_some_arrays_can_be_read_alone(two_steps):
    wanted = {"params/layers/0/weight": _abstract(_arrays(0.0))["params/layers/0/weight"]}
    assert set(two_steps.latest().arrays(wanted)) == set(wanted)


def test_another_shape_is_refused_by_name(two_steps):
    wrong = _abstract({"params/layers/0/weight": jnp.zeros((300, 201))})
    with pytest.raises(ValueError, match=r"params/layers/0/weight has shape \(300, 200\)"):
        two_steps.latest().arrays(wrong)


def test_donating_what_is_being_saved_does_not_change_it(open_checkpoints):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints = open_checkpoints(keep_last=4)
    # Results of a program, not arrays made from the host: only those are donated on a CPU.
    state = step({"params/w": jnp.zeros((2000, 1000))})
    for _ in range(4):
        number = int(state["params/w"][0, 0])
        checkpoints.save(number, state, **ABOUT)
        for _ in range(3):
            state = step(state)
    checkpoints.wait()
    steps = checkpoint.committed_steps(checkpoints.folder)
    assert steps == [1, 4, 7, 10]
    for number in steps:
        saved = checkpoint.read(checkpoint.step_folder(checkpoints.folder, number))
        assert (saved.arrays(_abstract(state))["params/w"] == number).all()


def test_a_half_written_checkpoint_is_not_seen_and_cleared_away(two_steps, open_checkpoints):
    # As a kill would leave it: everything but the manifest and the final name.
    draft = two_steps.folder / ".saving-00000030"
    shutil.copytree(two_steps.folder / "00000020", draft)
    (draft / "manifest.json").unlink()
    assert two_steps.latest().step == 20
    assert open_checkpoints().latest().step == 20
    assert not draft.exists()


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGES = {
    "flipped bit": lambda folder: _flip(_largest(folder / "arrays")),
    "flipped bit of the manifest": lambda folder: _flip(folder / "manifest.json"),
    "truncated file": lambda folder: _largest(folder / "arrays").write_bytes(b"short"),
    "missing file": lambda folder: (folder / "data_state.json").unlink(),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(two_steps, caplog, damage):
    damage(two_steps.folder / "00000020")
    with caplog.at_level("ERROR", logger="absl"):
        saved = two_steps.latest()
    assert saved.step == 10
    assert "00000020" in caplog.text and "Going back" in caplog.text
    assert (two_steps.folder / "corrupt-00000020").is_dir()
    two_steps.save(20, _arrays(21.0), **ABOUT)
    two_steps.wait()
    assert two_steps.latest().step == 20


def test_with_no_intact_checkpoint_nothing_starts_over_silently(two_steps):
    for step in ("00000010", "00000020"):
        _flip(two_steps.folder / step / "checkpoint.json")
    with pytest.raises(ValueError, match="no checkpoint is intact"):
        two_steps.latest()
    assert checkpoint.committed_steps(two_steps.folder) == [10, 20]


def test_a_newer_format_is_refused(two_steps, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 0)
    with pytest.raises(ValueError, match="format_version is 1, this version reads up to 0"):
        two_steps.latest()


def test_the_last_and_the_best_are_kept(open_checkpoints):
    checkpoints = open_checkpoints(keep_last=1, keep_best=2)
    for step, metric in enumerate((0.5, 0.3, 0.9, 0.4, 0.8), start=1):
        checkpoints.save(step, _arrays(0.0), **(ABOUT | {"metric": metric}))
    checkpoints.wait()
    assert checkpoint.committed_steps(checkpoints.folder) == [2, 4, 5]
    assert checkpoint.best_step(checkpoints.folder) == 2


def test_a_save_that_fails_is_told_at_the_next_call(open_checkpoints, monkeypatch):
    checkpoints = open_checkpoints()

    def fail(folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", fail)
    checkpoints.save(1, _arrays(0.0), **ABOUT)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.wait()
    assert checkpoint.committed_steps(checkpoints.folder) == []


def test_the_manifest_covers_every_file(two_steps):
    folder = two_steps.folder / "00000020"
    listed = json.loads((folder / "manifest.json").read_text())
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert set(listed) == found - {"manifest.json"}
