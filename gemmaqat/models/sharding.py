"""Where parameters live on a mesh, from the logical axes that their declarations carry."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis of a parameter -> mesh axis. Meshes without such an axis keep it whole.
DEFAULT_RULES: Mapping[str, str] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
}


def parameter_sharding(
    variable: nnx.Variable, mesh: Mesh, rules: Mapping[str, str] = DEFAULT_RULES
) -> NamedSharding:
    """The sharding of one parameter; an axis that the mesh does not divide is kept whole."""
    shape: tuple[int, ...] = variable.shape
    axes: tuple[Any, ...] = variable.get_metadata().get("axes") or (None,) * len(shape)
    spec: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        name = rules.get(axis)
        usable = name in mesh.shape and name not in spec and size % mesh.shape[name] == 0
        spec.append(name if usable else None)
    # `jax.make_mesh` gives explicit axes, under which every gather must name its result's layout;
    # the model leaves that to the compiler.
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), PartitionSpec(*spec))


def default_sharding() -> jax.sharding.Sharding:
    """The whole array on the default device."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]  # set at run time
    return jax.sharding.SingleDeviceSharding(chosen or jax.local_devices()[0])
