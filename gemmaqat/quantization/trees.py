"""Parameter trees by path: an NNX model, an `nnx.State`, a nested dict, any pytree of arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from gemmaqat.packed import PackedTensor
from gemmaqat.typing import Params


def weights(params: Params) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Every parameter as path -> (array, abstract array or PackedTensor; its metadata)."""
    flat, _ = jax.tree_util.tree_flatten_with_path(_state(params), is_leaf=_is_leaf)
    return {_path(keys): _open(leaf) for keys, leaf in flat}


def map_weights(function: Callable[[str, Any], Any], params: Params) -> Params:
    """The same tree with `function(path, array)` in the place of every parameter."""
    if isinstance(params, nnx.Module):
        graph, state, *rest = nnx.split(params, nnx.Param, ...)
        return nnx.merge(graph, map_weights(function, state), *rest)

    def one(keys: Any, leaf: Any) -> Any:
        value = function(_path(keys), _open(leaf)[0])
        return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_leaf)


def hook_points(model: nnx.Module) -> dict[str, Any]:
    """The model's hook points, quantized ones too, by path, in the order of the graph."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if getattr(module, "is_hook_point", False)
    }


def with_modules(model: nnx.Module, modules: Mapping[str, nnx.Module]) -> Any:
    """A copy of the model, its arrays shared, with other modules at some paths."""
    model = nnx.clone(model)
    for path, module in modules.items():
        *way, name = path.split("/")
        parent: Any = model
        for step in way:
            parent = parent[int(step)] if step.isdigit() else getattr(parent, step)
        setattr(parent, name, module)
    return model


def is_activation_scale(metadata: Mapping[str, Any]) -> bool:
    """Whether a parameter is the scale of a quantizer at a hook point, and so no weight."""
    return bool(metadata.get("activation_scale"))


def _state(params: Params) -> Params:
    return nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params


def _is_leaf(node: Any) -> bool:
    return isinstance(node, (nnx.Variable, PackedTensor))


def _open(leaf: Any) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(leaf, nnx.Variable):
        return leaf.get_value(), leaf.get_metadata()
    return leaf, {}


def _path(keys: Any) -> str:
    return "/".join(_name(key) for key in keys)


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
