"""What is wrong with a file is said in one sentence; nothing crashes and nothing is allocated."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from gemmaqat.interop.gguf_file import GgufFile
from gemmaqat.interop.gguf_model import config_metadata, rope_factors, tensor_name
from gemmaqat.interop.gguf_reader import read_gguf
from gemmaqat.interop.gguf_tokenizer import tokenizer_metadata
from gemmaqat.interop.hf import stored_shape
from gemmaqat.models.sizes import model_config
from gemmaqat.planning.parameters import abstract_parameters

CONFIG = model_config("12b_mini")
KINDS = gguf.GGMLQuantizationType


def make(
    path: Path, *, change=None, drop=(), types=None, tensors=None, raw=None, config=CONFIG
) -> Path:
    """A valid file by the gguf package, or one with something changed, dropped or added."""
    metadata = {**config_metadata(config), **tokenizer_metadata({}, config), **(change or {})}
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "gemma4"))
    for key, value in metadata.items():
        if key in drop:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
                   str: writer.add_string}[type(value)]  # fmt: skip
            add(key, value)
    rng = np.random.default_rng(0)
    arrays = {"rope_freqs.weight": rope_factors(config)}
    for name, leaf in abstract_parameters(config).items():
        shape = stored_shape(name, leaf.shape)
        arrays[tensor_name(name)] = rng.standard_normal(shape).astype(np.float32)
    for name, array in {**arrays, **(tensors or {})}.items():
        if name in drop:
            continue
        kind = (types or {}).get(name)
        if name in (raw or {}):
            writer.add_tensor(name, raw[name][0], raw_dtype=raw[name][1])
        elif kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    return make(tmp_path_factory.mktemp("gguf") / "good.gguf").read_bytes()


def test_a_file_of_the_gguf_package_is_read_as_it_is(tmp_path):
    types = {
        "token_embd.weight": KINDS.Q8_0,
        "blk.0.attn_q.weight": KINDS.Q4_0,
        "blk.1.attn_q.weight": KINDS.BF16,
        "blk.2.attn_q.weight": KINDS.F16,
    }
    path = make(tmp_path / "x.gguf", types=types)
    made = read_gguf(path)
    values = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    bits = {"embed_tokens/weight": 8, "layers/0/self_attn/q_proj/weight": 4}
    for name, tensor in made.tensors.items():
        entry, piece = made.table[name], tensor.read(0, tensor.num_rows)
        assert (entry.grid.bits if entry.grid else None) == bits.get(name)
        if tensor.grid is not None:
            codes, scales = piece
            piece = codes * np.repeat(scales.astype(np.float32), 32, axis=1)
        found = np.asarray(piece, np.float32).reshape(tensor.shape)
        np.testing.assert_array_equal(found, values[tensor_name(name)].reshape(tensor.shape))
    assert made.config.num_layers == 6
    assert made.config.attention_k_eq_v


def test_q2_k_off_our_grids_is_read_as_floats(tmp_path):
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (64, 84)).astype(np.uint8)
    blocks[:, 80:] = np.array([0.5, 0.25], np.float16).view(np.uint8)
    path = make(tmp_path / "x.gguf", raw={"blk.0.ffn_down.weight": (blocks, KINDS.Q2_K)})
    tensor = read_gguf(path).tensors["layers/0/mlp/down_proj/weight"]
    assert tensor.grid is None
    np.testing.assert_array_equal(tensor.read(0, 64), gguf.dequantize(blocks, KINDS.Q2_K))


BROKEN = {
    "another architecture": (dict(change={"general.architecture": "llama"}), "'llama'.*'gemma4'"),
    "no block count": (dict(drop=("gemma4.block_count",)), "'gemma4.block_count'.*missing"),
    "no window pattern": (
        dict(drop=("gemma4.attention.sliding_window_pattern",)),
        "sliding_window_pattern.*missing",
    ),
    "a pattern of another length": (
        dict(change={"gemma4.attention.sliding_window_pattern": [True, False]}),
        "2 values of bool, expected 6 flags",
    ),
    "no full layer": (
        dict(change={"gemma4.attention.sliding_window_pattern": [True] * 6}),
        "no layer.*full attention",
    ),
    "a text for a number": (
        dict(change={"gemma4.embedding_length": "64"}),
        "'gemma4.embedding_length' is '64', expected a whole number",
    ),
    "a flag for a number": (
        dict(change={"gemma4.embedding_length": True}),
        "'gemma4.embedding_length' is True, expected a whole number",
    ),
    "zero width": (dict(change={"gemma4.embedding_length": 0}), "is 0, expected 1 to"),
    "huge layer count": (dict(change={"gemma4.block_count": 2**31}), "is 2147483648, expected"),
    "heads that do not divide": (
        dict(change={"gemma4.attention.head_count_kv": [3, 3, 1, 3, 3, 1]}),
        "num_heads=4 is not a multiple of 3",
    ),
    "not a number": (
        dict(change={"gemma4.rope.freq_base": float("nan")}),
        "rope.freq_base' is nan, expected a finite number",
    ),
    "a missing tensor": (
        dict(drop=("blk.3.ffn_up.weight",)),
        r"'blk.3.ffn_up.weight' of shape \[256, 64\] is missing",
    ),
    "a config that contradicts a tensor": (
        dict(change={"gemma4.feed_forward_length": 128}),
        r"'blk.0.ffn_down.weight' has shape \[64, 256\], the metadata asks for \[64, 128\]",
    ),
    "a surplus tensor": (
        dict(tensors={"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}),
        "'blk.0.attn_sinks.weight' is no part of the Gemma 4",
    ),
    "no rope factors": (dict(drop=("rope_freqs.weight",)), "'rope_freqs.weight' is not there"),
    "rope factors of another scaling": (
        dict(tensors={"rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)}),
        "not some ones followed by 1e30",
    ),
    "a head of its own": (
        dict(tensors={"output.weight": np.zeros((128, 64), np.float32)}),
        "'output.weight' differs from 'token_embd.weight'",
    ),
    "another tokenizer": (
        dict(change={"tokenizer.ggml.tokens": ["a", "b"]}),
        "2 tokens, but token_embd.weight has 128 rows",
    ),
    "a special token without a row": (
        dict(change={"tokenizer.ggml.bos_token_id": 128}),
        "special token 128 is outside the vocabulary of 128",
    ),
    "a quantized norm": (
        dict(types={"output_norm.weight": KINDS.Q8_0}),
        "'output_norm.weight' is a vector of Q8_0",
    ),
    "one of several parts": (dict(change={"split.count": 3}), "one of 3 parts"),
    "values in some layers": (
        dict(tensors={"blk.2.attn_v.weight": np.zeros((32, 64), np.float32)}),
        "some full-attention layers have attn_v",
    ),
    "an unread type": (
        dict(types={"blk.0.ffn_up.weight": KINDS.Q5_0}),
        "'blk.0.ffn_up.weight' has the type Q5_0, which is not one of F32",
    ),
    "alignment that is none": (
        dict(change={"general.alignment": 48}),
        "general.alignment is 48, expected a power of two",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_contradicts_itself_is_refused_in_one_sentence(tmp_path, name):
    changes, message = BROKEN[name]
    path = make(tmp_path / "x.gguf", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6, "allocated from a lying count"
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.gguf"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError, match="holds 0 .gguf files"):
        read_gguf(tmp_path)


def test_other_files_are_no_gguf(tmp_path):
    refused(tmp_path / "x", b"", "not a GGUF file")
    refused(tmp_path / "x", b"PK\x03\x04" + bytes(100), "not a GGUF file")
    refused(tmp_path / "x", b"GGUF", "ends inside the version")


def test_other_versions_are_refused(tmp_path, good):
    refused(tmp_path / "x", good[:4] + struct.pack("<I", 1) + good[8:], "version 1,")
    refused(tmp_path / "x", good[:4] + struct.pack(">I", 3) + good[8:], "it is big-endian")


def test_truncation_anywhere_is_noticed(tmp_path, good):
    rng = np.random.default_rng(0)
    for length in [*rng.integers(4, len(good) - 1, 60).tolist(), 8, 16, 24, len(good) - 4096]:
        refused(tmp_path / "x", good[:length], "truncated or damaged|truncated")


@pytest.mark.parametrize("offset", [8, 16])
@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 2**40, 10**7])
def test_counts_beyond_the_file_allocate_nothing(tmp_path, good, offset, count):
    lying = good[:offset] + struct.pack("<Q", count) + good[offset + 8 :]
    refused(tmp_path / "x", lying, "announces|ends inside|UTF-8|there twice|which GGUF does not")


def test_lengths_and_types_inside_the_header_are_checked(tmp_path, good):
    at = good.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    for offset, format_, value, message in (
        (0, "<I", 99, "type 99"),
        (4, "<I", 9, "array of type 9"),
        (8, "<Q", 2**50, "announces 1125899906842624 strings"),
        (16, "<Q", 2**62, "ends inside"),
        (24, "<B", 0xFF, "UTF-8"),
    ):
        place, size = at + offset, struct.calcsize(format_)
        bad = good[:place] + struct.pack(format_, value) + good[place + size :]
        refused(tmp_path / "x", bad, message)


def test_tensor_descriptions_are_checked(tmp_path, good):
    name = b"blk.0.ffn_up.weight"  # rank, two dimensions, type, offset
    at = good.index(name) + len(name)
    for offset, format_, value, message in (
        (0, "<I", 7, "rank 7"),
        (0, "<I", 0, "rank 0"),
        (4, "<Q", 0, "empty shape"),
        (4, "<Q", 2**63, "the file has"),
        (12, "<Q", 2**62, "the file has"),
        (20, "<I", 12, "type Q4_K"),
        (20, "<I", 1000, "type 1000"),
        (20, "<I", 10, "rows of 64 weights, Q2_K"),
        (24, "<Q", 2**63 + 32, "the file has"),
        (24, "<Q", 7, "not a multiple of 32"),
        (24, "<Q", 0, "overlap"),
    ):
        place, size = at + offset, struct.calcsize(format_)
        bad = good[:place] + struct.pack(format_, value) + good[place + size :]
        refused(tmp_path / "x", bad, message)


def test_a_key_or_tensor_twice_is_refused(tmp_path, good):
    twice = good.replace(b"gemma4.context_length", b"gemma4.rope.freq_base", 1)
    assert len(twice) == len(good)
    refused(tmp_path / "x", twice, "'gemma4.rope.freq_base' is there twice")
    twice = good.replace(b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight", 1)
    refused(tmp_path / "x", twice, "'blk.1.ffn_up.weight' is there twice")


_NUMBERS = (0, 1, 3, 31, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1)


def test_random_damage_to_the_header_is_read_through_or_refused(tmp_path, good):
    rng = np.random.default_rng(0)
    header, path, refusals = good.index(b"blk.5.post_ffw_norm"), tmp_path / "x.gguf", 0
    for _ in range(100):
        damaged = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(4, header))
            match rng.integers(4):
                case 0:
                    damaged[place] ^= 1 << int(rng.integers(8))
                case 1:
                    damaged[place : place + 8] = struct.pack(
                        "<Q", _NUMBERS[rng.integers(len(_NUMBERS))]
                    )
                case 2:
                    del damaged[place : place + int(rng.integers(1, 64))]
                case _:
                    del damaged[int(rng.integers(place, len(damaged))) :]
        path.write_bytes(damaged)
        try:
            made = read_gguf(path)
            for tensor in made.tensors.values():
                tensor.read(0, tensor.num_rows)
            assert all(made.files[name].is_file() for name in made.files)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            refusals += 1
    assert refusals > 50
