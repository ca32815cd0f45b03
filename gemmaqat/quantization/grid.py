"""`Grid`: what values a quantized weight may take, as a description that does nothing itself."""

import dataclasses
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

SCALE_RULES = ("ggml", "absmax", "absmax_half", "mean_abs", "mse", "q6_k")
SCALE_DTYPES = ("float32", "bfloat16", "float16")
LEVELS = ("full", "half", "ternary")
ROUNDINGS = ("even", "up", "away")
CHANNEL, TENSOR = 0, -1
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
SUPERBLOCK = 256  # weights that share the float16 of Q6_K's scales

_Q6_K: dict[str, Any] = dict(
    bits=6,
    block=16,
    levels="full",
    scale_rule="q6_k",
    scale_factor=1.0,
    scale_dtype="float32",
    scale_bits=None,
    anchor=False,
    round_scale="before",
    rounding="even",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What values a weight may take. Hashable: grids select compiled programs."""

    bits: int  # nominal, 2 to 8; ternary is 2
    block: int = CHANNEL  # weights under one scale: 16 to 256, CHANNEL (0) or TENSOR (-1)
    # full: codes -2^(b-1) .. 2^(b-1)-1; ternary: -1, 0, 1; half: 2-bit codes with the levels
    # -1.5, -0.5, 0.5, 1.5 (code + 1/2).
    levels: str = "full"
    # ggml: the value of largest magnitude, with its sign, gets the lowest code; absmax: the
    # largest magnitude gets the highest level q; absmax_half: it gets q + 1/2 (qwix);
    # mean_abs: scale_factor times the mean magnitude; mse: least squared error of 31 trials;
    # q6_k: a float16 per 256 weights times an int8 per 16, searched (float32 holds the product).
    scale_rule: str = "absmax"
    scale_factor: float = 1.0  # multiplies the absolute maximum or the mean magnitude
    scale_dtype: str = "float32"  # of the stored scale
    scale_bits: int | None = None  # significant bits of the stored scale; None = all of its dtype
    # Hold the lowest code in every nonzero block, at its value of largest magnitude, the scale
    # being the one of least squared error among the five nearest of `scale_bits` bits to that of
    # scale_rule "ggml" (the only one it goes with). A block of zeros has a zero scale.
    anchor: bool = False
    round_scale: str = "before"  # codes from the stored scale, or float32's
    rounding: str = "even"  # ties: to even, up (ggml Q4_0), away from zero (ggml Q8_0)

    def __post_init__(self) -> None:
        check_types(self, "grid: ")
        for field, known in (
            ("levels", LEVELS),
            ("scale_rule", SCALE_RULES),
            ("scale_dtype", SCALE_DTYPES),
            ("round_scale", ("before", "after")),
            ("rounding", ROUNDINGS),
        ):
            if getattr(self, field) not in known:
                found = getattr(self, field)
                raise ValueError(f"grid: {field}={found!r} is not one of {', '.join(known)}.")
        if self.scale_rule == "q6_k" and dataclasses.asdict(self) != _Q6_K:
            raise ValueError(
                "grid: scale_rule='q6_k' is the grid of one format, bits=6 and block=16 with all "
                "else left out; in a rule write weight_qtype='q6_k'."
            )
        if not 2 <= self.bits <= 8:
            raise ValueError(f"grid: bits={self.bits} is not between 2 and 8.")
        if self.levels != "full" and self.bits != 2:
            raise ValueError(f"grid: levels={self.levels!r} needs bits=2, found {self.bits}.")
        if self.levels != "full" and self.scale_rule == "ggml":
            raise ValueError(
                f"grid: scale_rule='ggml' needs the code -2^(bits-1), which levels={self.levels!r} "
                "does not have; use 'absmax', 'mean_abs' or 'mse'."
            )
        _check_block(self.block)
        if not 0 < self.scale_factor < np.inf:
            raise ValueError(f"grid: scale_factor={self.scale_factor} is not a positive number.")
        if self.scale_factor != 1.0 and self.scale_rule in ("ggml", "mse"):
            raise ValueError(f"grid: scale_rule={self.scale_rule!r} takes no scale_factor.")
        if self.scale_bits is not None and not 1 <= self.scale_bits <= 24:
            raise ValueError(f"grid: scale_bits={self.scale_bits} is not between 1 and 24.")
        if self.anchor and (self.scale_rule, self.round_scale) != ("ggml", "before"):
            raise ValueError(
                "grid: anchor=True needs scale_rule='ggml' and round_scale='before', found "
                f"{self.scale_rule!r} and {self.round_scale!r}: only a scale from the value of "
                "largest magnitude gives it the lowest code."
            )

    @property
    def lowest(self) -> int:
        """Lowest code."""
        return -1 if self.levels == "ternary" else -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """Highest code."""
        return 1 if self.levels == "ternary" else 2 ** (self.bits - 1) - 1

    @property
    def highest_level(self) -> float:
        """The level of the highest code: q of the scale rules."""
        return self.highest + (0.5 if self.levels == "half" else 0.0)

    @property
    def bf16_safe(self) -> bool:
        """Whether bfloat16 holds every value exactly."""
        return self.stored_scale_bits <= self.exact_scale_bits("bfloat16")

    @property
    def stored_scale_bits(self) -> int:
        """Significant bits of the stored scale, the leading one included."""
        bits = jnp.finfo(self.scale_dtype).nmant + 1
        return bits if self.scale_bits is None else min(bits, self.scale_bits)

    def exact_scale_bits(self, dtype: str) -> int:
        """Significant bits that a scale may have for every value to be exact in `dtype`.

        8, 6, 5 and 1 in bfloat16 for codes of 2, 3, 4 and 8 bits, 11, 9, 8 and 4 in float16: a
        product has the bits of both factors, but one with 1 or a power of two those of the other.
        The range of float16 must hold them, too: values of 4-bit codes and scales of 5 bits are
        exact there for scales of at least 2^-20 and at most 65504 / 8.
        """
        largest = 3 if self.levels == "half" else self.highest
        return jnp.finfo(dtype).nmant + 1 - (largest.bit_length() if largest > 1 else 0)

    @property
    def nominal_bits(self) -> float:
        """Information in one code: log2 3 for ternary."""
        return float(np.log2(3)) if self.levels == "ternary" else float(self.bits)

    @property
    def divisor(self) -> int:
        """What the contraction axis must be a multiple of."""
        return SUPERBLOCK if self.scale_rule == "q6_k" else max(self.block, 1)

    def num_blocks(self, length: int) -> int:
        """Scales along a contraction axis of `length`.

        Raises:
            ValueError: the block does not divide it.
        """
        if self.block <= 0:
            return 1
        if length % self.divisor:
            raise ValueError(f"a block of {self.divisor} does not divide an axis of {length}.")
        return length // self.block

    def scale_shape(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """Shape of the scales of a weight: its own, with the contraction axis divided."""
        scales = list(shape)
        scales[axis] = self.num_blocks(shape[axis])
        if self.block == TENSOR:
            scales[-3 - axis] = 1  # the matrix axis that is not contracted
        return tuple(scales)

    def describe(self) -> str:
        """A short name for tables, e.g. `int4 block 32 ggml f16`."""
        if self.scale_rule == "q6_k":
            return "q6_k (int6 block 16, scales int8 x f16)"
        kind = {"half": "half-integer", "ternary": "ternary"}.get(self.levels, "int")
        name = f"{kind}{self.bits}" if self.levels == "full" else kind
        where = {CHANNEL: "channel", TENSOR: "tensor"}.get(self.block, f"block {self.block}")
        factor = f" x{self.scale_factor:g}" if self.scale_factor != 1.0 else ""
        dtype = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[self.scale_dtype]
        after = " after" if self.round_scale == "after" else ""
        bits = f"/{self.scale_bits}b" if self.scale_bits else ""
        anchor = " anchored" if self.anchor else ""
        return f"{name} {where} {self.scale_rule}{factor} {dtype}{bits}{after}{anchor}"


def check_types(owner: Any, where: str) -> None:
    """Compares the fields of a dataclass with their annotations.

    Raises:
        TypeError: a field of another type; the message starts with `where`.
    """
    for field in dataclasses.fields(owner):
        if field.type is Any:
            continue
        found, kinds = getattr(owner, field.name), get_args(field.type) or (field.type,)
        if float in kinds:
            kinds = (*kinds, int)
        # bool is an int to Python; a flag in the place of a number is a mistake.
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise TypeError(
                f"{where}{field.name}={found!r} is {type(found).__name__}, expected {expected}."
            )


def _check_block(block: int) -> None:
    if block in (CHANNEL, TENSOR):
        return
    if not SMALLEST_BLOCK <= block <= LARGEST_BLOCK or block % SMALLEST_BLOCK:
        raise ValueError(
            f"grid: block={block} is not a multiple of {SMALLEST_BLOCK} between {SMALLEST_BLOCK} "
            f"and {LARGEST_BLOCK}; 0 means one scale per channel, -1 one per tensor."
        )


# The block formats of GGUF, each with the codes chosen for the stored scale.
NAMED_GRIDS = {
    "q4_0": Grid(
        bits=4, block=32, scale_rule="ggml", scale_dtype="float16", scale_bits=5, anchor=True
    ),
    "q8_0": Grid(bits=8, block=32, scale_dtype="float16"),
    "q6_k": Grid(**_Q6_K),
}
