"""Files: what is read, how it is split, and what is said about a bad one."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from gemmaqat.data.records import TextRecords, open_records


def _open(path, file_format="auto", text_field="text"):
    return open_records(path, file_format, text_field=text_field, block_bytes=1_000, span_bytes=200)


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
    spans = [fields["text"] for fields, _ in _all(records)]
    assert "".join(spans) == text
    assert max(len(span.encode()) for span in spans) <= 200
    assert all(span.endswith("\n") for span in spans[:40])


def test_blocks_of_a_text_do_not_depend_on_the_span(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(2_000)))
    short = TextRecords(path, block_bytes=1_000, span_bytes=100)
    long = TextRecords(path, block_bytes=1_000, span_bytes=500)
    assert len(short) > len(long)
    assert list(dict.fromkeys(short.groups)) == list(dict.fromkeys(long.groups))


def test_jsonl_reads_every_kind_of_record_and_skips_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(record) for record in RECORDS))
    found = _all(_open(path))
    assert [fields for fields, _ in found] == RECORDS
    assert found[1][1] == f"{path}:3"


def test_parquet_rows_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    chats = [[{"role": "user", "content": f"{i}"}] for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats, "other": list(range(5))}), path)
    assert [fields["messages"] for fields, _ in _all(_open(path))] == chats


def test_array_records_hold_json_or_text(tmp_path):
    values = [json.dumps(RECORDS[0]).encode(), b"plain text", b"{not json"]
    path = _write_array_record(tmp_path / "a.arrayrecord", values)
    found = [fields for fields, _ in _all(_open(path))]
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
    assert _open(path, text_field="body").read(0)[0] == {"body": "a"}


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
