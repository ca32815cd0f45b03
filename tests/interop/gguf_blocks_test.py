"""Block encoders against the `gguf` package, which decodes every type and encodes some."""

import gguf
import numpy as np
import pytest

from gemmaqat.interop import gguf_blocks as blocks

R, K = 3, 512


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def theirs(raw: np.ndarray, name: str) -> np.ndarray:
    return gguf.dequantize(raw, gguf.GGMLQuantizationType[name])


def halves(rng, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 3, shape)).astype(np.float16)


@pytest.mark.parametrize("name", blocks.TYPES)
def test_numbers_and_sizes_are_ggmls(name):
    kind = blocks.TYPES[name]
    number = gguf.GGMLQuantizationType[name]
    assert kind.number == number
    assert (kind.block, kind.num_bytes) == gguf.GGML_QUANT_SIZES[number]


def test_q4_0_decodes_to_code_times_scale(rng):
    codes = rng.integers(-8, 8, (R, K), np.int8)
    scales = halves(rng, R, K // 32)
    raw = blocks.encode_q4_0(codes, scales)
    value = codes * np.repeat(scales.astype(np.float32), 32, axis=-1)
    np.testing.assert_array_equal(theirs(raw, "Q4_0"), value)
    again, kept = blocks.decode_q4_0(raw)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(kept.view(np.uint16), scales.view(np.uint16))


def test_q8_0_decodes_to_code_times_scale(rng):
    codes = rng.integers(-128, 128, (R, K)).astype(np.int8)
    scales = halves(rng, R, K // 32)
    raw = blocks.encode_q8_0(codes, scales)
    value = codes * np.repeat(scales.astype(np.float32), 32, axis=-1)
    np.testing.assert_array_equal(theirs(raw, "Q8_0"), value)
    again, kept = blocks.decode_q8_0(raw)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(kept.view(np.uint16), scales.view(np.uint16))


def test_q6_k_decodes_to_code_times_exact_scale(rng):
    rows = blocks.Superblocks(
        rng.integers(-32, 32, (R, K)).astype(np.int8),
        halves(rng, R, K // 256),
        rng.integers(-128, 128, (R, K // 16)).astype(np.int8),
    )
    raw = blocks.encode_q6_k(rows)
    value = rows.codes * np.repeat(rows.scales, 16, axis=-1)
    np.testing.assert_array_equal(theirs(raw, "Q6_K"), value)
    exact = rows.d.astype(np.float64).repeat(16, axis=-1) * rows.sub
    np.testing.assert_array_equal(rows.scales.astype(np.float64), exact)
    for ours, original in zip(blocks.decode_q6_k(raw), rows, strict=True):
        np.testing.assert_array_equal(ours, original)


def test_q2_k_decodes_as_ggml_does(rng):
    rows = blocks.AffineSuperblocks(
        rng.integers(0, 4, (R, K)).astype(np.uint8),
        halves(rng, R, K // 256),
        halves(rng, R, K // 256),
        rng.integers(0, 16, (R, K // 16)).astype(np.uint8),
        rng.integers(0, 16, (R, K // 16)).astype(np.uint8),
    )
    raw = blocks.encode_q2_k(rows)
    np.testing.assert_array_equal(theirs(raw, "Q2_K"), blocks.q2_k_values(rows))
    for ours, original in zip(blocks.decode_q2_k(raw), rows, strict=True):
        np.testing.assert_array_equal(ours, original)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_bytes_of_ggmls_own_quantizer_survive_decoding_and_encoding(rng, name):
    raw = gguf.quantize(
        rng.standard_normal((R, K)).astype(np.float32), gguf.GGMLQuantizationType[name]
    )
    decode, encode = {
        "Q4_0": (blocks.decode_q4_0, blocks.encode_q4_0),
        "Q8_0": (blocks.decode_q8_0, blocks.encode_q8_0),
    }[name]
    np.testing.assert_array_equal(encode(*decode(raw)), raw)


def test_any_bytes_survive_decoding_and_encoding(rng):
    for name, decode, encode in (
        ("Q6_K", blocks.decode_q6_k, blocks.encode_q6_k),
        ("Q2_K", blocks.decode_q2_k, blocks.encode_q2_k),
    ):
        size = blocks.row_bytes(blocks.TYPES[name], K)
        raw = rng.integers(0, 256, (R, size)).astype(np.uint8)
        np.testing.assert_array_equal(encode(decode(raw)), raw)
