"""`q4_0_ggml` and `q8_0_ggml` against the quantizers of the `gguf` package, to the bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemmaqat.quantization.grids import dequantize, quantize
from gemmaqat.quantization.recipes import recipe

gguf = pytest.importorskip("gguf")

TYPES = {
    "q4_0_ggml": gguf.GGMLQuantizationType.Q4_0,
    "q8_0_ggml": gguf.GGMLQuantizationType.Q8_0,
}
every_type = pytest.mark.parametrize("name", TYPES)


def theirs(blocks: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[blocks, 32]`, half scales and dequantized values by the gguf package."""
    raw = gguf.quantize(blocks, TYPES[name])
    scales = raw[:, :2].copy().view(np.float16)[:, 0]
    codes = raw[:, 2:]
    if name == "q4_0_ggml":  # low nibbles hold the first half of the block, high ones the second
        codes = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.int8) - 8
    return codes.view(np.int8), scales, gguf.dequantize(raw, TYPES[name])


def ours(blocks: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same by our grid, blocks along the contraction axis of a matrix."""
    grid = recipe(name)[-1].grid(32)
    codes = quantize(jnp.asarray(blocks.T), grid)
    value = dequantize(codes.codes, codes.scales, grid)
    return np.asarray(codes.codes).T, np.asarray(codes.scales)[0], np.asarray(value).T


def ties(step: float) -> np.ndarray:
    """Blocks whose elements lie on and one ulp around the middle between two codes."""
    extreme = np.float32(-8 * step)
    middle = (np.arange(31) - 15.5).astype(np.float32) / 2 * np.float32(step)
    below, above = np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)
    blocks = [
        np.concatenate([[extreme], m.clip(-7.5 * step, 7.5 * step)]) for m in (middle, below, above)
    ]
    return np.asarray(blocks, np.float32)


def adversarial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((512, 32)).astype(np.float32)
    signs = np.tile(np.array([1, -1], np.float32), 16)
    return {
        "normal": normal,
        "laplace": rng.laplace(size=(512, 32)).astype(np.float32),
        "wide range": (normal * np.exp(4 * rng.standard_normal((512, 32)))).astype(np.float32),
        "constant": np.full((1, 32), 0.37, np.float32),
        "zero": np.zeros((1, 32), np.float32),
        "tiny: scale subnormal in half": normal * np.float32(1e-5),
        "tiny: scale zero in half": normal * np.float32(1e-9),
        "huge": normal * np.float32(1e4),
        "beyond half": normal * np.float32(1e9),
        "equal extremes, positive first": signs[None, :],
        "equal extremes, negative first": -signs[None, :],
        "opposite extreme clips": np.concatenate([[-1, 1], np.zeros(30)]).astype(np.float32)[
            None, :
        ],
        "ties, exact step": ties(0.25),
        "ties, inexact steps": np.concatenate([ties(s) for s in (0.1, 1 / 3, 0.7, 1e-3)]),
        "integers": rng.integers(-127, 128, (512, 32)).astype(np.float32),
        "bfloat16 values": np.asarray(jnp.asarray(normal, jnp.bfloat16).astype(jnp.float32)),
    }


@every_type
@pytest.mark.parametrize("kind", adversarial())
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_codes_and_scales_equal_gguf(kind, name):
    blocks = adversarial()[kind]
    codes, scales, values = ours(blocks, name)
    expected_codes, expected_scales, expected_values = theirs(blocks, name)
    np.testing.assert_array_equal(scales.view(np.uint16), expected_scales.view(np.uint16))
    wrong = np.argwhere(codes != expected_codes)
    distances = [distance_to_tie(blocks, *index, name) for index in wrong]
    assert not len(wrong), "\n".join(
        f"element {tuple(index)}: code {codes[tuple(index)]}, gguf {expected_codes[tuple(index)]}, "
        f"{distance:.3g} ulp from a tie"
        for index, distance in zip(wrong, distances, strict=True)
    )
    if np.all(np.isfinite(expected_values)):
        np.testing.assert_array_equal(values, expected_values)


def distance_to_tie(blocks: np.ndarray, block: int, element: int, name: str) -> float:
    """Distance of `x / d` from the nearest half-integer, in units of its last place."""
    extreme = blocks[block][np.abs(blocks[block]).argmax()].astype(np.float64)
    step = extreme / -8 if name == "q4_0_ggml" else abs(extreme) / 127
    ratio = blocks[block, element].astype(np.float64) / step
    return abs(ratio - (np.floor(ratio) + 0.5)) / np.spacing(np.float32(abs(ratio)))


def test_ties_that_float32_decides_are_decided_as_gguf_does():
    """On a tie of x / d the rounded reciprocal moves some elements off it, by under an ulp."""
    name, found = "q4_0_ggml", []
    for step in (0.1, 1 / 3, 0.7, 1e-3):
        blocks = ties(step)[:1]
        codes, _, _ = ours(blocks, name)
        np.testing.assert_array_equal(codes, theirs(blocks, name)[0])
        scale = blocks[0, 0].astype(np.float64) / -8
        half_up = np.floor(blocks[0].astype(np.float64) / scale + 0.5).clip(-8, 7)
        found += [(step, int(i)) for i in np.flatnonzero(codes[0] != half_up)]
        for i in np.flatnonzero(codes[0] != half_up):
            distance = distance_to_tie(blocks, 0, int(i), name)
            assert distance <= 1, f"step {step}, element {i}: {distance} ulp from a tie"
    assert found, "no element was decided by float32 arithmetic: the test shows nothing"


def test_a_flat_subnormal_block_has_the_same_values():
    """Below 2^-126 XLA flushes to zero and 1 / d overflows in ggml; both store a zero scale."""
    blocks = np.full((1, 32), 1e-40, np.float32)
    _, scales, values = ours(blocks, "q4_0_ggml")
    assert scales[0] == 0 and not np.any(values)
