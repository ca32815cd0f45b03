"""The loader: deterministic, reshuffled, resumable in another process, disjoint from hold-out."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemmaqat.data.config import DataConfig
from gemmaqat.data.loader import holdout, make_loader

SMALL = DataConfig(sequence_length=64, batch_size=4)


@pytest.fixture
def mixture(tmp_path) -> DataConfig:
    """Two small files with every kind of short and long document, and the tasks."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    lines = [" ".join(rng.choice(words, size=rng.integers(1, 40))) for _ in range(400)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    with (tmp_path / "b.jsonl").open("w") as file:
        for i in range(60):
            json.dump({"prompt": f"{i}?", "response": " ".join(rng.choice(words, size=3))}, file)
            file.write("\n")
    return dataclasses.replace(
        SMALL,
        source="files",
        files=(
            dict(path=str(tmp_path / "*.txt"), weight=2.0),
            dict(path=str(tmp_path / "b.jsonl")),
            dict(source="tasks", weight=1),
        ),
    )


def _equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and np.array_equal(left[k], right[k]) for k in left
    )


def _documents(batches: list[dict]) -> list[bytes]:
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                found.append(batch["targets"][row][batch["segment_ids"][row] == segment].tobytes())
    return found


def test_batches_have_the_promised_fields():
    batch = next(make_loader(SMALL, seed=0))
    assert {name: (field.shape, str(field.dtype)) for name, field in batch.items()} == {
        "tokens": ((4, 64), "int32"),
        "targets": ((4, 64), "int32"),
        "loss_weights": ((4, 64), "float32"),
        "segment_ids": ((4, 64), "int32"),
        "positions": ((4, 64), "int32"),
    }
    weights = np.unique(batch["loss_weights"])
    assert weights.tolist() == pytest.approx([0, 0.1, 1])


def test_rows_are_nearly_full():
    loader = make_loader(dataclasses.replace(SMALL, sequence_length=128), seed=0)
    filled = np.mean([(next(loader)["segment_ids"] > 0).mean() for _ in range(32)])
    assert filled > 0.95, filled


def test_equal_seeds_give_equal_batches_and_others_do_not(mixture):
    for config in (SMALL, mixture):
        first, again, other = (make_loader(config, seed=s) for s in (7, 7, 8))
        for _ in range(20):
            batch = next(first)
            assert _equal(batch, next(again))
            assert not _equal(batch, next(other))


def test_the_config_seed_counts_too():
    other = dataclasses.replace(SMALL, seed=5)
    assert not _equal(next(make_loader(SMALL, seed=0)), next(make_loader(other, seed=0)))


def test_every_epoch_is_whole_and_in_another_order(tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i:04d}"}) + "\n" for i in range(200)))
    config = dataclasses.replace(SMALL, source="files", files=(dict(path=str(path)),))
    loader = make_loader(config, seed=0)
    found = _documents([next(loader) for _ in range(3 * 200 // 16 + 40)])
    once = set(found)
    per_epoch = len(once)
    assert 150 < per_epoch < 200  # the rest is held out
    # Rows are shuffled within windows, so epochs blur at their edges by at most a window.
    counts = [found.count(document) for document in once]
    assert max(counts) - min(counts) <= 2
    assert found[:150] != found[per_epoch : per_epoch + 150]


def test_a_saved_position_continues_exactly_in_a_new_process(mixture, tmp_path):
    loader = make_loader(mixture, seed=3)
    stop = int(np.random.default_rng().integers(1, 60))
    for _ in range(stop):
        next(loader)
    state = loader.get_state()
    expected = [next(loader) for _ in range(25)]  # after the state was taken, past a window's end
    arguments = tmp_path / "arguments.json"
    arguments.write_text(json.dumps({"config": dataclasses.asdict(mixture), "state": state}))
    script = """
import json, sys
import numpy as np
from gemmaqat.data.config import DataConfig
from gemmaqat.data.loader import make_loader
given = json.load(open(sys.argv[1]))
given["config"]["files"] = tuple(given["config"]["files"])
loader = make_loader(DataConfig(**given["config"]), seed=3)
loader.set_state(given["state"])
batches = [next(loader) for _ in range(25)]
np.savez(sys.argv[2], **{f"{i}/{k}": v for i, b in enumerate(batches) for k, v in b.items()})
"""
    output = tmp_path / "batches.npz"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, arguments, output], check=True, cwd=root)
    with np.load(output) as found:
        for i, batch in enumerate(expected):
            got = {name: found[f"{i}/{name}"] for name in batch}
            assert _equal(batch, got), f"batch {i} after the state at step {stop}"


def test_positions_across_windows_can_be_restored(mixture):
    loader, restored = make_loader(mixture, seed=1), make_loader(mixture, seed=1)
    for step in range(36):  # a window is 16 batches
        if step % 5 > 1:
            next(loader)
            continue
        state = json.loads(json.dumps(loader.get_state()))  # as a checkpoint would keep it
        batch = next(loader)
        restored.set_state(state)
        assert _equal(batch, next(restored)), step


def test_a_state_of_other_data_is_refused():
    state = make_loader(SMALL, seed=0).get_state()
    with pytest.raises(ValueError, match="another data set, tokenizer, seed or batch shape"):
        make_loader(SMALL, seed=1).set_state(state)
    with pytest.raises(ValueError, match="format_version 2"):
        make_loader(SMALL, seed=0).set_state(state | {"format_version": 2})


def test_holdout_is_fixed_padded_and_disjoint_from_training(mixture):
    for config in (SMALL, mixture):
        held = holdout(config, num_sequences=6)
        assert [batch["tokens"].shape for batch in held] == [(4, 64)] * 2
        assert not held[1]["segment_ids"][2:].any()  # 6 rows in batches of 4
        assert all(map(_equal, held, holdout(config, num_sequences=6)))
        loader = make_loader(config, seed=0)
        train = set(_documents([next(loader) for _ in range(30)]))
        long = {document for document in _documents(held) if len(document) > 4 * 12}
        assert long and not long & train


def test_a_small_holdout_ends_instead_of_repeating(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)))
    config = dataclasses.replace(SMALL, source="files", files=(dict(path=str(path)),))
    found = _documents(holdout(config, num_sequences=1_000))
    assert 0 < len(found) == len(set(found)) < 20


def test_weights_are_shares_of_rows(mixture):
    loader = make_loader(mixture, seed=0)
    rows = np.concatenate([next(loader)["tokens"] for _ in range(100)])
    texts = [loader.tokenizer.decode(row) for row in rows]
    from_text = np.mean(["?" not in text and "=" not in text for text in texts])
    assert from_text == pytest.approx(0.5, abs=0.03)  # weight 2 of 2 + 1 + 1
