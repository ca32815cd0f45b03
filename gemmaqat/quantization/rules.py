"""Rules to table: the first rule that matches a module decides, and every parameter is told.

The counterpart in qwix matches rules where ops run; here they match parameters, so nothing can be
missed: each parameter is quantized by a named rule or listed with the reason why it is not.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from gemmaqat.packed import Order
from gemmaqat.quantization import trees
from gemmaqat.quantization.activation_rules import resolve_activations
from gemmaqat.quantization.grid import LARGEST_BLOCK, NAMED_GRIDS, SMALLEST_BLOCK, Grid
from gemmaqat.quantization.mobile import MOBILE, check_size
from gemmaqat.quantization.recipes import recipe
from gemmaqat.quantization.rule import ACTIVATION_FIELDS
from gemmaqat.quantization.rule import Rule as Rule
from gemmaqat.quantization.rule import as_rule as as_rule
from gemmaqat.quantization.table import Entry as Entry
from gemmaqat.quantization.table import Table as Table
from gemmaqat.typing import Params

WEIGHT_NAMES = ("weight", "kernel", "embedding")


def resolve(
    rules_or_recipe: Any, params: Params, *, rules: Sequence[Any] = (), calibration: str = ""
) -> Table:
    """What happens to every parameter. Arrays may be abstract: nothing is computed.

    Args:
        rules_or_recipe: a recipe's name, a rule, or a sequence of rules (`Rule`, a dict of its
            fields, or a qwix rule).
        params: an NNX model, an `nnx.State`, or a nested dict. `nnx.Param` metadata
            `contraction_axis` says which axis is contracted, `gather_only` that rows are only ever
            read. Without it a matrix is contracted over axis -2, a leaf named `embedding` over
            -1, and an array of rank 3 or more is kept: it may be a stack of experts, a projection
            to heads or a convolution, whose axes differ. Pure dicts carry no metadata, so resolve
            the model or its state and use that table for the dict. Rules about activations need
            the model itself, for hook points are modules.
        rules: tried before `rules_or_recipe`; first match wins.
        calibration: method for all activations in the place of the rules' own; "" = theirs.

    Raises:
        ValueError: an unknown recipe, field or value; a rule that matches nothing; a block that
            does not divide its axis; a mobile recipe on a model of another size; modules that
            share an input and disagree on it.
    """
    own = [as_rule(rule, where=f"quantization.rules[{i}]") for i, rule in enumerate(rules)]
    named = isinstance(rules_or_recipe, str)
    places = [f"quantization.rules[{i}]" for i in range(len(own))]
    if named:
        following = list(recipe(rules_or_recipe))
        places += [f"recipe {rules_or_recipe!r}, rule {r.name!r}" for r in following]
    else:
        if not isinstance(rules_or_recipe, Sequence):
            rules_or_recipe = (rules_or_recipe,)
        places += [f"quantization.rules[{len(own) + i}]" for i in range(len(rules_or_recipe))]
        following = [
            as_rule(rule, where=place)
            for rule, place in zip(rules_or_recipe, places[len(own) :], strict=True)
        ]
    if calibration:
        own, following = (
            [_calibrated_by(calibration, r) for r in part] for part in (own, following)
        )
    chain = own + following
    weights = trees.weights(params)
    if named and rules_or_recipe in MOBILE:
        shapes = {path: tuple(value.shape) for path, (value, _) in weights.items()}
        check_size(rules_or_recipe, shapes, own)
    entries = tuple(
        _resolve_one(path, value, metadata, chain, places)
        for path, (value, metadata) in weights.items()
        if not trees.is_activation_scale(metadata)
    )
    activations = resolve_activations(params, chain, places)
    used = {e.rule for e in entries} | {e.rule for e in activations}
    # A recipe is written for all models, so its rules may find nothing in one of them.
    _expect_all_used(own if named else chain, chain, places, entries, used)
    words = tuple(_in_words(rule) for rule in chain)
    return Table(entries, words, rules_or_recipe if named else "", activations)


def _calibrated_by(method: str, rule: Rule) -> Rule:
    if rule.dynamic or not any(getattr(rule, field) for field in ACTIVATION_FIELDS):
        return rule
    return dataclasses.replace(rule, act_calibration_method=method)


def _resolve_one(
    path: str, value: Any, metadata: Mapping[str, Any], chain: list[Rule], places: list[str]
) -> Entry:
    module, _, name = path.rpartition("/")
    axis = metadata.get("contraction_axis", -1 if name == "embedding" else -2)
    order: Order = "rows" if metadata.get("gather_only") else "contract"
    entry = dict(
        path=path,
        shape=tuple(value.shape),
        dtype=jnp.dtype(value.dtype).name,
        axis=axis,
        order=order,
    )
    reason = _no_candidate(name, value, declared="contraction_axis" in metadata)
    if reason:
        return Entry(**entry, reason=reason)
    for number, rule in enumerate(chain):
        if re.fullmatch(rule.module_path, module):
            grid, reason = _grid(rule, number, places[number], path, value.shape, axis)
            return Entry(**entry, rule=number, rule_name=rule.name or "", grid=grid, reason=reason)
    return Entry(**entry, reason="no rule matches")


def _no_candidate(name: str, value: Any, *, declared: bool) -> str:
    """Why no rule can quantize this parameter; "" if one can.

    `declared`: whether its metadata names the contraction axis.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"not a float array ({value.dtype})"
    if len(value.shape) < 2:
        return f"no matrix (rank {len(value.shape)}: a norm, scale or bias)"
    if name not in WEIGHT_NAMES:
        return f"no weight (its name is {name!r}, not {', '.join(WEIGHT_NAMES)})"
    if len(value.shape) > 2 and not declared:
        return f"rank {len(value.shape)}, no contraction axis declared"
    return ""


def _grid(
    rule: Rule, number: int, place: str, path: str, shape: tuple[int, ...], axis: int
) -> tuple[Grid | None, str]:
    """The grid a rule gives a parameter, or None and the reason."""
    if rule.weight_qtype is None:
        return None, f"kept by rule {number}" + (f" ({rule.name})" if rule.name else "")
    length = shape[axis]
    try:
        grid = rule.grid(length)
    except ValueError as error:
        raise ValueError(f"{place} on {path} {shape}: {error}") from None
    if length % grid.divisor == 0:
        return grid, ""
    if rule.indivisible == "keep":
        return None, f"kept by rule {number}: block {grid.divisor} does not divide {length}"
    if rule.indivisible == "channel" and rule.weight_qtype not in NAMED_GRIDS:
        return Rule(**rule.to_json() | {"tile_size": 0}).grid(length), ""
    other = NAMED_GRIDS.get(rule.indivisible)
    if other and length % other.divisor == 0:
        return other, ""
    if grid.divisor > grid.block:
        raise ValueError(
            f"{place}: weight_qtype={rule.weight_qtype!r} needs a multiple of {grid.divisor} along "
            f"axis {axis} (length {length}) of {path} {shape}; set indivisible='q8_0' or 'q4_0' "
            "(multiples of 32) or 'keep', or a rule of its own for it."
        )
    blocks = [
        b for b in range(SMALLEST_BLOCK, LARGEST_BLOCK + 1, SMALLEST_BLOCK) if length % b == 0
    ]
    raise ValueError(
        f"{place}: tile_size={grid.block} does not divide axis {axis} "
        f"(length {length}) of {path} {shape}; possible blocks: "
        f"{', '.join(map(str, blocks)) or 'none, use 0 (per channel)'}. Or set "
        "indivisible='channel' or 'keep'."
    )


def _expect_all_used(
    asked: list[Rule],
    chain: list[Rule],
    places: list[str],
    entries: tuple[Entry, ...],
    used: set[int | None],
) -> None:
    """A rule somebody wrote must decide something."""
    candidates = {
        entry.path.rpartition("/")[0]: entry for entry in entries if entry.rule is not None
    }
    modules = {entry.path.rpartition("/")[0] for entry in entries}
    for number, rule in enumerate(chain):
        if number in used or not any(rule is one for one in asked):
            continue
        matched = [m for m in sorted(modules) if re.fullmatch(rule.module_path, m)]
        where = f"{places[number]}: module_path={rule.module_path!r}"
        taken = [m for m in matched if m in candidates]
        if taken:
            raise ValueError(
                f"{where} matches only modules that earlier rules decide (first: {taken[0]}, by "
                f"rule {candidates[taken[0]].rule}); move it up or remove it."
            )
        if matched and rule.weight_qtype is None:
            continue
        if matched:
            raise ValueError(
                f"{where} matches only parameters that are never quantized (first: {matched[0]})."
            )
        raise ValueError(f"{where} matches nothing; nearest paths: {_nearest(rule, modules)}.")


def _nearest(rule: Rule, modules: set[str]) -> str:
    """Three module paths that look most like a pattern."""
    plain = re.sub(r"\\d[+*]?", "0", rule.module_path)
    plain = re.sub(r"[\\^$()?*+|\[\].]", "", plain)
    near = difflib.get_close_matches(plain, sorted(modules), n=3, cutoff=0.0)
    return ", ".join(near) or "none (the tree is empty)"


def _in_words(rule: Rule) -> str:
    fields = rule.to_json()
    what = "float" if rule.weight_qtype is None else rule.weight_qtype
    rest = ", ".join(f"{k}={v!r}" for k, v in fields.items() if k not in ("weight_qtype",))
    return f"{what} ({rest})"
