"""Strict flags for every test: shapes checked, silent broadcasting refused, several devices."""

import importlib.util
import os

# Before JAX starts: sharding tests need more than one device.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A verb run in this process would leave the user's cache on for every test after it.
os.environ["GEMMAQAT_COMPILATION_CACHE"] = "off"

import jax
from jaxtyping import install_import_hook

install_import_hook("gemmaqat", "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Its modules import the readers of other projects, which the default environment lacks.
if importlib.util.find_spec("torch") is None:
    collect_ignore = ["interop_foreign"]
