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
from gemmaqat.data.sources import (
    block_bytes,
    held_out,
    make_sources,
    matching_files,
    stdlib_files,
)
from gemmaqat.data.tokenizer import make_tokenizer

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


def test_a_text_file_is_a_few_long_stretches_with_one_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(6_600)))
    assert 60_000 < path.stat().st_size < 70_000
    config = _config(dict(path=str(path)), sequence_length=128)
    parts = [make_sources(config, s, task_seed=0)[0].source for s in ("train", "holdout")]
    documents = [d for part in parts for i in range(len(part)) for d in part[i]]
    assert len(documents) <= 33
    assert min(len(d.pieces[0].text) for d in documents) >= 8 * 128
    assert [d.end for d in documents].count(True) == 1
    (last,) = [d for d in documents if d.end]
    assert last.pieces[0].text.endswith("line 6599\n")


def test_files_end_and_stretches_do_not(tmp_path):
    last = "the last line of a file\n"
    for name in "abcdef":
        text = "".join(f"{name} {i}\n" for i in range(1_000)) + last
        (tmp_path / f"{name}.txt").write_text(text)
    config = _config(dict(path=str(tmp_path / "*.txt")), batch_size=1)
    loader = make_loader(config, seed=0)
    endings = 0
    for _ in range(2_000):
        row = next(loader)
        for segment in range(1, row["segment_ids"].max() + 1):
            targets = row["targets"][row["segment_ids"] == segment]
            if targets[-1] == loader.tokenizer.eos_id:
                ending = loader.tokenizer.decode(targets)
                assert ending.endswith(last) or last.endswith(ending), ending
                endings += 1
    assert endings > 3


@pytest.mark.parametrize(
    ("total", "length", "expected"),
    [
        (10**9, 128, 2**20),  # large: still many blocks
        (10**7, 128, 50_000),  # a two-hundredth
        (10**6, 128, 2**14),
        (10**6, 1_024, 2**14),  # the same hold-out
        (10**6, 4_096, 2**16),  # several rows
        (10**9, 2**17, 2**21),
        (66_000, 128, 8_250),  # small: an eighth
        (66_000, 4_096, 8_250),
        (1_000, 128, 512),
    ],
)
def test_blocks_hold_several_rows_and_small_texts_can_be_split(total, length, expected):
    assert block_bytes(total, length) == expected


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
    ends = [source[i][0].end for source in parts.values() for i in range(len(source))]
    assert ends.count(True) == len(files) < len(ends)  # a long file goes on


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
    text = tmp_path / "b.txt"
    text.write_text("plain\n" * 1_000 + "café")
    for place, where in ((path, r"a\.jsonl:2"), (str(text), r"b\.txt at byte \d+")):
        config = _config(dict(path=place))
        with pytest.raises(ValueError, match=where + r": byte 195 at offset \d+ .*'bytes-256'"):
            make_loader(config, seed=0)
        next(make_loader(dataclasses.replace(config, tokenizer="bytes-256"), seed=0))


CONTENTS = "{% for m in messages %}{{ m.content }};{% endfor %}"  # a chat template


def _chat_folder(folder, template=CONTENTS):
    (folder / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [json.dumps({"messages": chat, "id": i}) + "\n" for i in range(9)]
    (folder / "chats.jsonl").write_text("".join(lines))
    return _config(dict(path=str(folder / "chats.jsonl")), chat_template=str(folder))


def test_a_chat_that_the_template_refuses_is_named_at_opening(tmp_path):
    refusal = "{% if messages[0].content == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    config = _chat_folder(tmp_path, refusal + CONTENTS)
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "assistant", "content": "x"}]}\n')
    with pytest.raises(ValueError, match=r"chats\.jsonl:10: .*refuses the chat: no x"):
        make_sources(config, "train", task_seed=0)


def test_what_a_template_writes_must_be_in_the_vocabulary(tmp_path):
    config = _chat_folder(tmp_path, "{% for m in messages %}¶{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: byte 194 at offset 0"):
        make_sources(config, "train", task_seed=0, tokenizer=make_tokenizer(config))


def test_a_fingerprint_covers_how_records_become_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "a{i}", "body": "b{i}"}}\n' for i in range(99)))
    fingerprint = lambda config: make_loader(config, seed=0).fingerprint  # noqa: E731
    entries = [dict(), dict(text_field="body"), dict(format="text")]
    found = [fingerprint(_config(dict(path=str(path)) | entry)) for entry in entries]
    assert len(set(found)) == 3
    chats = _chat_folder(tmp_path)
    before = fingerprint(chats)
    assert fingerprint(chats) == before
    (tmp_path / "chat_template.jinja").write_text(CONTENTS.replace(";", "."))
    assert fingerprint(chats) != before
