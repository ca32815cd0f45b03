"""Files: what is read, how it is split, and what is said about a bad one."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from gemmaqat.data.records import TextRecords, open_records


def _accept(record):
    pass


def _open(path, file_format="auto", *, text_field="text", check=_accept):
    return open_records(
        path, file_format, text_field=text_field, check=check, block_bytes=1_000, span_bytes=200
    )


def _all(records):
    return [records.read(i) for i in range(len(records))]


def _write_array_record(path, values):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for value in values:
        writer.write(value)
    writer.close()
    return path


RECORDS = [{"text": "één"}, {"prompt": "1+1?", "response": "2"}, {"text": "three"}]


def test_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i} {'ü' * (i % 50)}\n" for i in range(300)) + "x" * 5_000 + "é" * 400
    path = tmp_path / "a.txt"
    path.write_text(text)
    records = _open(path)
    spans = [record.fields["text"] for record in _all(records)]
    assert "".join(spans) == text
    assert max(len(span.encode()) for span in spans) <= 200
    assert all(span.endswith("\n") for span in spans[:40])


def test_blocks_of_a_text_do_not_depend_on_the_span(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(2_000)))
    short = TextRecords(path, check=_accept, block_bytes=1_000, span_bytes=100)
    long = TextRecords(path, check=_accept, block_bytes=1_000, span_bytes=500)
    assert len(short) > len(long)
    assert list(dict.fromkeys(short.groups)) == list(dict.fromkeys(long.groups))


def test_only_the_last_stretch_of_a_text_ends_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(2_000)))
    ends = [record.end for record in _all(_open(path))]
    assert len(ends) > 50 and ends == [False] * (len(ends) - 1) + [True]


@pytest.mark.parametrize("length", [1_001, 1_999, 7_040])
def test_stretches_of_a_text_are_about_equal(tmp_path, length):
    path = tmp_path / "a.txt"
    path.write_text(("x" * 9 + "\n") * (length // 10) + "x" * (length % 10))
    records = TextRecords(path, check=_accept, block_bytes=1_000, span_bytes=1_000)
    sizes = [len(records.read(i).fields["text"]) for i in range(len(records))]
    assert sum(sizes) == length and max(sizes) <= 1_000 and min(sizes) >= 450


def test_every_record_is_checked_at_opening(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 500)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    _write_array_record(tmp_path / "a.arrayrecord", [b"one", b'{"text": "two"}'])
    for path in sorted(tmp_path.iterdir()):
        checked = []
        assert _all(_open(path, check=checked.append)) == checked


def test_jsonl_reads_every_kind_of_record_and_skips_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(record) for record in RECORDS))
    found = _all(_open(path))
    assert [record.fields for record in found] == RECORDS
    assert found[1].where == f"{path}:3"


def test_parquet_rows_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    chats = [[{"role": "assistant", "content": f"{i}"}] for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats, "other": list(range(5))}), path)
    assert [record.fields for record in _all(_open(path))] == [{"messages": c} for c in chats]


def test_parquet_chats_keep_their_tools_and_get_no_empty_fields(tmp_path):
    path = tmp_path / "a.parquet"
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    rows = [
        {"messages": [{"role": "user", "content": "1+1?"}, call], "tools": [{"name": "add"}]},
        {
            "messages": [{"role": "assistant", "content": "hi"}],
            "tools": [{"name": "b", "doc": "c"}],
        },
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [record.fields for record in _all(_open(path))] == rows


def test_array_records_hold_json_or_text(tmp_path):
    values = [json.dumps(RECORDS[0]).encode(), b"plain text", b"{not json"]
    path = _write_array_record(tmp_path / "a.arrayrecord", values)
    found = [record.fields for record in _all(_open(path))]
    assert found == [RECORDS[0], {"text": "plain text"}, {"text": "{not json"}]


def test_equal_records_have_equal_groups(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "a"}\n')
    groups = _open(path).groups
    assert groups.dtype == np.uint64
    assert groups[0] == groups[2] != groups[1]


def test_another_field_can_hold_the_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a"}\n')
    assert _open(path, text_field="body").read(0).fields == {"body": "a"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.txt", b"text\n" * 500 + b"\x00\x01", r"a\.txt: binary data \(byte 0x00 at offset 2500"),
        ("a.txt", b"caf\xe9 noir", r"a\.txt: binary data \(byte 0xe9 at offset 3"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: holds no records"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl:2: expected an object .* found list"),
        ("a.jsonl", b'{"txt": "a"}\n', r"a\.jsonl:1: no field 'text' \(fields: txt\)"),
        ("a.jsonl", b'{"prompt": "a"}\n', r"a\.jsonl:1: no field 'response'"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: field 'text' is int, expected text"),
        ("a.jsonl", b"\xff\xfe\x00", r"a\.jsonl:1: not UTF-8 text"),
        ("a.jsonl", b'{"messages": null}', r"a\.jsonl:1: 'messages' is NoneType, expected a list"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}]}',
            r"a\.jsonl:1: the chat has no assistant turn",
        ),
        ("a.parquet", b"not parquet at all", r"a\.parquet: not a readable Parquet file"),
        ("a.arrayrecord", b"not array record" * 99, r"a\.arrayrecord: not a readable ArrayRecord"),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        _open(path)
    assert "\n" not in str(error.value).strip()


def test_parquet_without_a_known_column_lists_what_it_has(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    with pytest.raises(ValueError, match=r"no field 'text' \(fields: body\)"):
        _open(path)


def test_binary_array_records_are_refused(tmp_path):
    path = _write_array_record(tmp_path / "a.arrayrecord", [b"fine", b"\xff\xfe"])
    with pytest.raises(ValueError, match="record 1: neither JSON nor UTF-8"):
        _open(path)
