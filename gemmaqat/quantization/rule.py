"""`Rule`: which modules, which grid for the weight, which activations in 8 bits.

A qwix rule with more fields.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gemmaqat.quantization.grid import CHANNEL, NAMED_GRIDS, TENSOR, Grid, check_types

QTYPES = ("int8", "int4", "int3", "int2", "ternary", *NAMED_GRIDS)
ACTIVATION_QTYPES = ("int8",)
ACTIVATION_FIELDS = ("act_qtype", "output_qtype", "kv_qtype")
INDIVISIBLE = ("error", "keep", "channel", "q8_0", "q4_0")

# Fields of qwix rules that have no meaning here, with the values that ask for nothing.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "op_names": (((), []), "weights are quantized as parameters, not where an op reads them"),
    "act_batch_axes": (((0,), [0]), "a static scale is one number for the whole tensor"),
    "bwd_qtype": ((None,), "gradients stay float"),
    "bwd_calibration_method": (("absmax",), "gradients stay float"),
    "bwd_weight_grad_tile_size": ((None,), "gradients stay float"),
    "bwd_stochastic_rounding": ((None,), "gradients stay float"),
    "channelwise_noise_axes": (((0,), [0]), "gradients stay float"),
    "additional_qt_config": ((None,), "it configures qwix's own products"),
}
# What a whole grid given by name settles.
_GRID_FIELDS = (
    "tile_size",
    "weight_calibration_method",
    "disable_channelwise_axes",
    "levels",
    "scale_rule",
    "scale_factor",
    "scale_dtype",
    "scale_bits",
    "anchor",
    "round_scale",
    "rounding",
)
# Fields that qwix leaves at None where nothing is asked for.
_UNSET_IN_QWIX = ("act_static_scale", "act_calibration_method")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Modules by path, and what becomes of their weights and activations.

    The first eight fields are qwix's and mean what they mean there; `module_path` is matched whole,
    first match wins. A rule that sets nothing else gives qwix's codes. Without a static scale, an
    input is rounded token by token, whatever the blocks of the weight.
    """

    module_path: str = ".*"  # regular expression for the whole path, e.g. r"layers/\d+/mlp/.*"
    weight_qtype: Any = None  # int8 | int4 | int3 | int2 | ternary, or a dtype; None = stay float;
    #                          or a whole grid by name: q4_0 | q8_0 | q6_k, see NAMED_GRIDS
    tile_size: int | float | None = None  # block along the contraction axis; 1/n = n blocks;
    #                                       None or 0 = one scale per channel
    weight_calibration_method: str = "absmax"  # or "absmax,<factor>"
    disable_channelwise_axes: bool = False  # one scale per matrix
    act_qtype: Any = None  # int8: the module's input; modules that share one must agree on it
    act_static_scale: bool = False  # one calibrated scale; False: each token of an input its own
    act_calibration_method: str = "absmax"  # mean over batches of the largest magnitude, or
    #                                         "absmax,<factor>", "percentile,<percent>", "mse"

    output_qtype: Any = None  # int8: the module's output
    kv_qtype: Any = None  # int8: the keys and values that an attention module caches
    value_scale: float | None = None  # constant scale of those values; None = calibrated
    name: str = ""  # shown in the table
    levels: str = "full"  # full | half (2 bits: -1.5, -0.5, 0.5, 1.5)
    scale_rule: str | None = None  # see Grid; None = qwix's, absmax_half
    scale_factor: float = 1.0
    scale_dtype: str = "float32"  # float32 | bfloat16 | float16
    scale_bits: int | None = None  # significant bits of the scale
    anchor: bool = False  # hold the lowest code in every block, see Grid; needs scale_rule "ggml"
    bf16_safe: bool = False  # refuse a grid with values that bfloat16 rounds
    round_scale: str = "before"  # before | after the codes are chosen
    rounding: str = "even"  # even | up | away
    # A block that does not divide: error | keep (float) | channel, or another grid: q8_0 | q4_0.
    indivisible: str = "error"

    def __post_init__(self) -> None:
        check_types(self, "")
        try:
            re.compile(self.module_path)
        except re.error as error:
            raise ValueError(
                f"module_path={self.module_path!r} is not a regular expression: {error}."
            ) from None
        object.__setattr__(self, "weight_qtype", _qtype_name(self.weight_qtype))
        self._check_activations()
        if self.indivisible not in INDIVISIBLE:
            raise ValueError(_not_one_of("indivisible", self.indivisible, INDIVISIBLE))
        tile = self.tile_size
        if isinstance(tile, int) and tile < 0:
            raise ValueError(
                f"tile_size={tile} is negative; 0 or None means one scale per channel, "
                "disable_channelwise_axes=True one per matrix."
            )
        if isinstance(tile, float) and not 0 < tile <= 1:
            raise ValueError(
                f"tile_size={tile} as a fraction of the axis must be above 0, at most 1."
            )
        if tile and self.disable_channelwise_axes:
            raise ValueError("disable_channelwise_axes with a tile_size is not a grid known here.")
        if self.weight_qtype is not None:
            self.grid(length=None)  # the remaining fields are checked by the grid itself

    def grid(self, length: int | None) -> Grid:
        """The grid on a contraction axis of `length`, which only a fractional tile needs.

        Raises:
            ValueError: the fields do not make a grid.
        """
        if self.weight_qtype in NAMED_GRIDS:
            grid = NAMED_GRIDS[self.weight_qtype]
            own = {key for key in self.to_json() if key in _GRID_FIELDS}
            if own:
                raise ValueError(
                    f"weight_qtype={self.weight_qtype!r} is a whole grid ({grid.describe()}), so "
                    f"{', '.join(sorted(own))} must be left out; or spell the grid out from "
                    f"weight_qtype='int{grid.bits}'."
                )
            return self._checked(grid)
        scale_rule, factor = self._scale_rule()
        ternary = self.weight_qtype == "ternary"
        if ternary and self.levels not in ("full", "ternary"):
            raise ValueError(f"levels={self.levels!r} does not go with weight_qtype='ternary'.")
        grid = Grid(
            bits=2 if ternary else int(self.weight_qtype[3:]),
            block=self._block(length),
            levels="ternary" if ternary else self.levels,
            scale_rule=scale_rule,
            scale_factor=factor,
            scale_dtype=self.scale_dtype,
            scale_bits=self.scale_bits,
            anchor=self.anchor,
            round_scale=self.round_scale,
            rounding=self.rounding,
        )
        return self._checked(grid)

    def _checked(self, grid: Grid) -> Grid:
        """The grid, if it keeps what `bf16_safe` asks for."""
        if not self.bf16_safe or (grid.bf16_safe and grid.bits < 8):
            return grid
        if grid.bits >= 8:
            raise ValueError(
                f"bf16_safe=True with {grid.bits}-bit codes ({grid.describe()}): of bfloat16's 8 "
                "bits they leave 1 to the scale, so no useful grid of theirs is exact in it; use "
                "4-bit codes or fewer, or keep the values in float32."
            )
        limit = grid.exact_scale_bits("bfloat16")
        raise ValueError(
            f"bf16_safe=True with {grid.describe()}: bfloat16 rounds values of {grid.bits}-bit "
            f"codes whose scale has more than {limit} significant bits; set scale_bits={limit}."
        )

    def _check_activations(self) -> None:
        for field in ACTIVATION_FIELDS:
            found = getattr(self, field)
            if found is not None:
                found = _qtype_name(found, field, ACTIVATION_QTYPES)
                object.__setattr__(self, field, found)
            if found is not None and not self.act_static_scale and field != "act_qtype":
                raise ValueError(
                    f"{field}={found!r} without act_static_scale=True: a scale for each token "
                    "(dynamic) is for the inputs of modules alone; set it."
                )
        if self.act_static_scale and not any(getattr(self, f) for f in ACTIVATION_FIELDS):
            raise ValueError(
                "act_static_scale=True, but nothing is quantized under it; set act_qtype, "
                "output_qtype or kv_qtype, or leave it out."
            )
        check_calibration(self.act_calibration_method)
        if self.dynamic and self.act_calibration_method != "absmax":
            raise ValueError(
                f"act_calibration_method={self.act_calibration_method!r} without "
                "act_static_scale=True: each token's own largest magnitude makes its scale, "
                "nothing is calibrated; set it, or leave the method out."
            )
        if self.value_scale is not None and not (self.kv_qtype and self.value_scale > 0):
            raise ValueError(
                f"value_scale={self.value_scale} is the positive scale of quantized values; it "
                "needs kv_qtype."
            )

    @property
    def dynamic(self) -> bool:
        """Whether inputs are quantized under a scale for each token."""
        return self.act_qtype is not None and not self.act_static_scale

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults; `as_rule` reads them."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def _block(self, length: int | None) -> int:
        if self.disable_channelwise_axes:
            return TENSOR
        if isinstance(self.tile_size, float):
            if length is None or self.tile_size == 1.0:
                return CHANNEL
            return round(length * self.tile_size)
        return self.tile_size or CHANNEL

    def _scale_rule(self) -> tuple[str, float]:
        """The scale rule and factor, from qwix's calibration string or from our own fields."""
        method, *arguments = self.weight_calibration_method.lower().split(",")
        if method in ("minmax", "rms", "fixed"):
            raise ValueError(
                f"weight_calibration_method={self.weight_calibration_method!r} is not supported: "
                "grids are symmetric and their scale comes from the block itself; use 'absmax' or "
                "one of our scale_rule values: ggml, absmax, absmax_half, mean_abs, mse."
            )
        if method != "absmax" or len(arguments) > 1:
            raise ValueError(
                f"weight_calibration_method={self.weight_calibration_method!r} is not 'absmax' or "
                "'absmax,<factor>'."
            )
        if not arguments:
            return self.scale_rule or "absmax_half", self.scale_factor
        if self.scale_rule is not None or self.scale_factor != 1.0:
            raise ValueError(
                f"weight_calibration_method={self.weight_calibration_method!r} and scale_rule/"
                "scale_factor both set the scale; keep one of them."
            )
        try:
            return "absmax_half", float(arguments[0])
        except ValueError:
            raise ValueError(
                f"weight_calibration_method={self.weight_calibration_method!r}: "
                f"{arguments[0]!r} is not a number."
            ) from None


def as_rule(source: Any, *, where: str) -> Rule:
    """A `Rule` from a `Rule`, a mapping of its fields, or a qwix `QuantizationRule`.

    Args:
        source: the rule.
        where: how to name it in an error, e.g. `quantization.rules[1]`.

    Raises:
        ValueError: an unknown field or value (with the nearest name), or a qwix field that cannot
            be honoured.
        TypeError: not a rule at all, or a field of the wrong type.
    """
    if isinstance(source, Rule):
        return source
    if dataclasses.is_dataclass(source) and not isinstance(source, type):
        source = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    if not isinstance(source, Mapping):
        raise TypeError(f"{where}: expected a rule (a dict of its fields), found {source!r}.")
    fields = [f.name for f in dataclasses.fields(Rule)]
    kept = {}
    for key, value in source.items():
        if key in _REFUSED:
            harmless, reason = _REFUSED[key]
            if value not in harmless:
                raise ValueError(f"{where}: {key}={value!r} cannot be honoured: {reason}.")
        elif key not in fields:
            near = difflib.get_close_matches(key, [*fields, *_REFUSED], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}."
            raise ValueError(f"{where}: no field {key!r}; {hint}")
        elif value is not None or key not in _UNSET_IN_QWIX:
            kept[key] = value
    try:
        return Rule(**kept)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


def check_calibration(method: str) -> tuple[str, float]:
    """The parts of a calibration method: its name and its number.

    Raises:
        ValueError: it is none of absmax[,factor], percentile,percent and mse.
    """
    name, *arguments = method.lower().split(",")
    try:
        numbers = [float(argument) for argument in arguments]
    except ValueError:
        numbers = [0.0]
    if name == "absmax" and len(numbers) <= 1 and all(n > 0 for n in numbers):
        return name, numbers[0] if numbers else 1.0
    if name == "percentile" and len(numbers) == 1 and 0 < numbers[0] <= 100:
        return name, numbers[0]
    if name == "mse" and not numbers:
        return name, 0.0
    raise ValueError(
        f"calibration method {method!r} is not absmax, absmax,<factor>, percentile,<percent> "
        "(as percentile,99.9) or mse."
    )


def _qtype_name(
    qtype: Any, field: str = "weight_qtype", known: tuple[str, ...] = QTYPES
) -> str | None:
    """The canonical name of an integer type, from a name or a dtype."""
    if qtype is None:
        return None
    if not isinstance(qtype, str):
        try:
            qtype = jnp.dtype(qtype).name
        except TypeError:
            raise ValueError(_not_one_of(field, qtype, known)) from None
    if qtype not in known:
        raise ValueError(_not_one_of(field, qtype, known))
    return qtype


def _not_one_of(field: str, found: Any, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(found), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{field}={found!r} is not one of {', '.join(known)}{hint}"
