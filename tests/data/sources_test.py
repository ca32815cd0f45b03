"""Sources: mixtures, splits by content, and entries that make no sense."""

import dataclasses
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from gemmaqat.data.config import DataConfig
from gemmaqat.data.loader import make_loader
from gemmaqat.data.sources import held_out, make_sources, matching_files, stdlib_files

FILES = DataConfig(source="files", sequence_length=32, batch_size=2)


def _config(*entries: dict, **fields) -> DataConfig:
    return dataclasses.replace(FILES, files=entries, **fields)


def _texts(config: DataConfig, split: str) -> list[str]:
    (part,) = make_sources(config, split, task_seed=0)
    documents = [d for i in range(len(part.source)) for d in part.source[i]]
    return ["".join(piece.text for piece in document.pieces) for document in documents]


def _write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_the_split_is_by_content_and_covers_everything(tmp_path):
    texts = [f"text {i}" for i in range(300)]
    config = _config(dict(path=_write_lines(tmp_path / "a.jsonl", texts + texts[:150])))
    train, held = _texts(config, "train"), _texts(config, "holdout")
    assert sorted(train + held) == sorted(texts + texts[:150])
    assert not set(train) & set(held)
    assert 3 <= len(set(held)) <= 40  # one in twenty of 300
    reversed_ = _config(dict(path=_write_lines(tmp_path / "b.jsonl", texts[::-1])))
    assert set(_texts(reversed_, "holdout")) == set(held)


def test_a_single_text_file_is_split_too(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(3_000)))
    config = _config(dict(path=str(path)))
    train, held = _texts(config, "train"), _texts(config, "holdout")
    assert sum(map(len, train + held)) == path.stat().st_size
    lines = lambda texts: {line for text in texts for line in text.splitlines()}  # noqa: E731
    assert lines(held) and not lines(train) & lines(held)


def test_few_records_still_give_a_holdout():
    groups = np.asarray([21, 41, 61], np.uint64)  # none is a multiple of twenty
    assert held_out(groups, "data").tolist() == [True, False, False]
    with pytest.raises(ValueError, match="data: holds a single record"):
        held_out(groups[:1], "data")


def test_named_holdout_files_are_not_trained_on(tmp_path):
    texts = [f"text {i}" for i in range(50)]
    config = _config(
        dict(path=_write_lines(tmp_path / "train.jsonl", texts)),
        holdout_files=(dict(path=_write_lines(tmp_path / "held.jsonl", texts[40:] + ["new"])),),
    )
    assert _texts(config, "holdout") == [*texts[40:], "new"]
    assert _texts(config, "train") == texts[:40]


def test_training_on_the_holdout_alone_is_an_error(tmp_path):
    entry = dict(path=_write_lines(tmp_path / "a.jsonl", ["a", "b"]))
    with pytest.raises(ValueError, match="every record also stands in data.holdout_files"):
        make_sources(_config(entry, holdout_files=(entry,)), "train", task_seed=0)


def test_the_stdlib_is_source_without_tests_split_by_file():
    files = stdlib_files()
    assert files == sorted(files) and len(files) > 300
    assert not any(
        part in {"test", "tests", "site-packages"} for f in files for part in f.parts[4:]
    )
    config = DataConfig(source="stdlib")
    parts = {split: make_sources(config, split, task_seed=0)[0].source
             for split in ("train", "holdout")}  # fmt: skip
    found = {}
    for split, source in parts.items():
        documents = [source[i][0] for i in range(0, len(source), 5)]
        found[split] = {document.where.split(" at byte")[0] for document in documents}
    assert found["train"] and found["holdout"] and not found["train"] & found["holdout"]


def test_every_format_reaches_the_batches(tmp_path):
    words = {name: [f"{name} {i}" for i in range(40)] for name in ("lines", "table", "array")}
    _write_lines(tmp_path / "a.jsonl", words["lines"])
    pyarrow.parquet.write_table(
        pyarrow.table({"body": words["table"]}), tmp_path / "b.parquet", row_group_size=7
    )
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "c.arrayrecord"), "")
    for text in words["array"]:
        writer.write(json.dumps({"prompt": text, "response": "yes"}).encode())
    writer.close()
    config = _config(
        dict(path=str(tmp_path / "a.jsonl")),
        dict(path=str(tmp_path / "*.parquet"), text_field="body"),
        dict(path=str(tmp_path / "c.arrayrecord")),
    )
    loader = make_loader(config, seed=0)
    seen = set()
    for _ in range(60):
        batch = next(loader)
        for targets, ids in zip(batch["targets"], batch["segment_ids"], strict=True):
            seen |= {loader.tokenizer.decode(targets[ids == i]) for i in range(1, ids.max() + 1)}
    words["array"] = [f"{text}yes" for text in words["array"]]
    for texts in words.values():
        assert 30 <= len(seen.intersection(texts)) < 40  # all but the hold-out
    assert seen <= {text for texts in words.values() for text in texts}


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (dict(pth="a"), ValueError, r"data\.files\[0\]: no key 'pth'; did you mean path\?"),
        (dict(), ValueError, "give either path"),
        (dict(path="a", source="tasks"), ValueError, "give either path"),
        (dict(source="wiki"), ValueError, "'wiki' is not one of tasks, stdlib"),
        (dict(path="a", format="jsonlines"), ValueError, "did you mean 'jsonl'"),
        (dict(path="a", weight=0), ValueError, r"weight: 0.0 is not above 0"),
        (dict(path="a", weight="2"), TypeError, r"weight: expected a number, found '2'"),
        (dict(path=3), TypeError, r"path: expected text, found 3"),
    ],
)
def test_a_wrong_entry_is_explained(entry, error, message):
    with pytest.raises(error, match=message):
        make_sources(_config(entry), "train", task_seed=0)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"files\[1\]: .*no-such.txt: no such file"):
        matching_files(str(tmp_path / "no-such.txt"), "data.files[1]")
    with pytest.raises(FileNotFoundError, match="no file matches this pattern"):
        matching_files(str(tmp_path / "*.txt"), "data.files[0]")
    with pytest.raises(FileNotFoundError, match="is a folder; name its files"):
        matching_files(str(tmp_path), "data.files[0]")


def test_a_double_star_descends(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("x/b.txt", "x/y/a.txt", "c.txt"):
        (tmp_path / name).write_text("text")
    found = matching_files(str(tmp_path / "**" / "*.txt"), "here")
    assert [str(p.relative_to(tmp_path)) for p in found] == ["c.txt", "x/b.txt", "x/y/a.txt"]


def test_bytes_outside_the_vocabulary_name_the_file(tmp_path):
    path = _write_lines(tmp_path / "a.jsonl", ["plain", "café", "naïve"])
    loader = make_loader(_config(dict(path=path)), seed=0)
    with pytest.raises(ValueError, match=r"a\.jsonl:\d: byte \d+ at offset \d .*'bytes-256'"):
        for _ in range(100):
            next(loader)
