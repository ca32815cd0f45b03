"""Parameter trees as flat dictionaries by path, and their hash."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemmaqat.typing import Params


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by path, `layers/3/self_attn/q_proj/weight`, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {prefix + _path(keys): leaf for keys, leaf in leaves}


def unflatten(like: Any, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """The tree of the structure of `like` with the leaves that `flat` has under its paths.

    Raises:
        KeyError: a path of `like` is missing.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [flat[prefix + _path(keys)] for keys, _ in leaves])


def place_like(params: Params, state: Any) -> Any:
    """Puts every leaf of an optimizer state where its parameter lives, the others everywhere.

    A fresh state is made of constants, which know nothing of the parameters' devices; a program
    that met it first and its own results later would be compiled twice.
    """
    homes = {path: (leaf.shape, leaf.sharding) for path, leaf in flatten(params).items()}
    everywhere = next(iter(homes.values()))[1]
    if isinstance(everywhere, NamedSharding):
        everywhere = NamedSharding(everywhere.mesh, PartitionSpec())

    def place(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = _path(keys)
        for path, (shape, sharding) in homes.items():
            if name.endswith(path) and leaf.shape == shape:
                return jax.device_put(leaf, sharding)
        return jax.device_put(leaf, everywhere)

    return jax.tree_util.tree_map_with_path(place, state)


def hash_params(params: Params) -> str:
    """SHA-256 over path, dtype, shape and bytes of every leaf: equal only if bit-exact."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _path(keys: tuple[Any, ...]) -> str:
    # nnx keeps the array of a variable under an attribute of its own; it is no part of the name.
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")
