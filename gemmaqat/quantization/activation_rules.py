"""Which hook points a chain of rules quantizes, and how.

A hook point belongs to a module, and the rule that decides the module's weight decides its
activations, too: `act_qtype` its input, `output_qtype` its output, `kv_qtype` what an attention
module caches. An input that several modules share is decided by all of them, who must agree.
"""

import re
from collections.abc import Sequence
from typing import Any

from flax import nnx

from gemmaqat.quantization import trees
from gemmaqat.quantization.rule import ACTIVATION_FIELDS, Rule
from gemmaqat.quantization.table import ON, ActivationEntry
from gemmaqat.typing import Params

_FIELDS = {"input": "act_qtype", "output": "output_qtype"}  # by the hook point's name
_VALUES = "v"


def resolve_activations(
    params: Params, chain: Sequence[Rule], places: Sequence[str]
) -> tuple[ActivationEntry, ...]:
    """The quantized hook points of a model, in the order of its graph.

    Args:
        params: the model; of trees without modules nothing can be said.
        chain: the rules, first match wins.
        places: how to name each in an error.

    Raises:
        ValueError: a rule about activations with a tree that has no modules or with a field that
            fits none of the modules it decides; modules that share an input and disagree on it.
    """
    asking = [n for n, rule in enumerate(chain) if any(getattr(rule, f) for f in ACTIVATION_FIELDS)]
    if not asking:
        return ()
    if not isinstance(params, nnx.Module):
        raise ValueError(
            f"{places[asking[0]]}: quantizes activations, whose hook points only a model has; "
            "resolve the model itself, not its parameters."
        )
    hooks = trees.hook_points(params)
    fed = {m for path, hook in hooks.items() for m in _fed(path, hook, hooks)}
    found, reached = [], set()
    for path, hook in hooks.items():
        parent, _, name = path.rpartition("/")
        if name == "input" and not hook.feeds and parent in fed:
            continue  # the shared input stands for it
        modules = _fed(path, hook, hooks) or [parent]
        deciding = [_first_match(module, chain) for module in modules]
        field = _FIELDS.get(name, "kv_qtype")
        if len({_wish(chain, number, field) for number in deciding}) > 1:
            told = ", ".join(
                f"{m} by {'no rule' if n is None else places[n]}"
                for m, n in zip(modules, deciding, strict=True)
            )
            raise ValueError(
                f"{path}: modules that share this input disagree on {field} or its calibration "
                f"({told}); give them the same."
            )
        number = deciding[0]
        if number is not None and getattr(chain[number], field) is not None:
            found.append(_entry(path, chain[number], number, field))
            reached |= {(n, field) for n in deciding}
    parents = {path.rpartition("/")[0] for path in [*hooks, *trees.weights(params)]}
    decided = {_first_match(module, chain) for module in parents}
    for number in asking:
        for field in ACTIVATION_FIELDS:
            wanted = getattr(chain[number], field)
            if wanted and number in decided and (number, field) not in reached:
                raise ValueError(
                    f"{places[number]}: {field}={wanted!r} finds no hook point in the modules of "
                    f"module_path={chain[number].module_path!r}; leave it out."
                )
    return tuple(found)


def _fed(path: str, hook: Any, hooks: dict[str, Any]) -> list[str]:
    """The modules whose input a shared hook point is: those of its children that exist."""
    parent = path.rpartition("/")[0]
    return [f"{parent}/{m}" for m in hook.feeds if f"{parent}/{m}/input" in hooks]


def _first_match(module: str, chain: Sequence[Rule]) -> int | None:
    return next((n for n, r in enumerate(chain) if re.fullmatch(r.module_path, module)), None)


def _wish(chain: Sequence[Rule], number: int | None, field: str) -> tuple[Any, ...]:
    if number is None or getattr(chain[number], field) is None:
        return ()
    rule = chain[number]
    return getattr(rule, field), rule.act_static_scale, rule.act_calibration_method


def _entry(path: str, rule: Rule, number: int, field: str) -> ActivationEntry:
    constant = None
    if rule.dynamic:
        constant = ON
    elif field == "kv_qtype" and path.rpartition("/")[2] == _VALUES:
        constant = rule.value_scale
    return ActivationEntry(
        path=path,
        qtype=getattr(rule, field),
        static=rule.act_static_scale,
        calibration=rule.act_calibration_method,
        constant=constant,
        rule=number,
        rule_name=rule.name,
    )
