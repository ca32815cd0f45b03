"""The model as a LiteRT graph with placeholders where quantized arithmetic will stand.

A pass over the model is traced with its weights as arguments, so that no constant is folded,
rounded or copied into text. Where an activation meets a weight, a row is read from a table or an
activation is quantized, the program holds a StableHLO composite named `gemmaqat.*`. The converter
hands composites on untouched; `litert_graph` puts the runtime's own operators in their place.
"""

import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemmaqat.interop.hf import is_transposed
from gemmaqat.models.cache import KVCache, init_cache
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization import trees

LINEAR, LOOKUP, ACTIVATION = "gemmaqat.linear", "gemmaqat.lookup", "gemmaqat.activation"
MISSING = (
    "LiteRT export needs litert-converter and ai-edge-litert; install them with "
    "pip install 'gemmaqat[litert]'."
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlacedWeight:
    """A weight that meets activations through composites.

    Invariants: `rows` is `[R * n, row_length / n]`, the `R` rows of a matrix `[out, in]` or of a
    table `[V, D]`, each cut into the n blocks that have a scale of their own.
    """

    rows: Any
    row_length: int = dataclasses.field(metadata=dict(static=True))
    transposed: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, int]:
        """As the model sees it: `[in, out]`, or `[V, D]` of a table."""
        count = self.rows.shape[0] * self.rows.shape[1] // self.row_length
        return (count, self.row_length) if self.transposed else (self.row_length, count)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return 2

    @property
    def T(self) -> "PlacedWeight":  # noqa: N802
        """The transposed view."""
        return dataclasses.replace(self, transposed=not self.transposed)

    def contract(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        """`x` times every row."""
        return _linear(x, self.rows)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Rows of a table; ids are clipped to it."""
        blocks = self.row_length // self.rows.shape[1]
        ids = jnp.clip(ids.reshape(-1), 0, self.rows.shape[0] // blocks - 1).astype(jnp.int32)
        wanted = ids[:, None] * blocks + jnp.arange(blocks, dtype=jnp.int32)[None, :]
        rows = _lookup(wanted.reshape(-1), self.rows)
        return rows.reshape(-1, self.row_length)


class PlacedQuantizer(nnx.Module):
    """A hook point that becomes a quantizer of the runtime; the identity until then."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Marks `x`."""
        return jax.lax.composite(lambda x: x + 0, name=f"{ACTIVATION}.{self.number}")(x)


@dataclasses.dataclass(frozen=True)
class Program:
    """One signature: a pass over `length` tokens, with a cache of `cache_length` positions.

    Attributes:
        config: of the model.
        rows: path to the stored shape and row length of every matrix, see `PlacedWeight`;
            parameters of other ranks are absent.
        hooks: hook points that are quantized; their number is their place here.
        kv_scales: per layer the scales of int8 keys and values, None where a layer shares; empty
            for a float cache.
        length: tokens of a pass.
        cache_length: positions of the cache.
    """

    config: ModelConfig
    rows: Mapping[str, tuple[tuple[int, int], int]]
    hooks: Sequence[str]
    kv_scales: Sequence[tuple[float, float] | None]
    length: int
    cache_length: int

    def convert(self, name: str) -> bytes:
        """The graph as a flatbuffer of one signature, whose inputs include every parameter.

        Raises:
            ValueError: the converter is not installed.
        """
        api, ir, passes = (
            optional_module(f"litert_converter.{module}")
            for module in ("converter_api_ext", "mlir.ir", "mlir.passmanager")
        )
        arguments = self._arguments()
        text = jax.jit(self._pass, keep_unused=True).lower(*arguments.values()).as_text()
        context = ir.Context()
        api.prepare_mlir_context(context)
        with context, ir.Location.unknown(context):
            module = ir.Module.parse(text)
            outputs = ["logits", *self._cache_names()]
            api.set_signature(module.operation, name, list(arguments), outputs)
            api.run_convert_to_tfl_passes(module, passes.PassManager(), api.ConvertToTFLConfig())
            return api.export_flatbuffer_to_bytes(module.operation)

    def _pass(self, tokens: Array, positions: Array, *rest: Array) -> tuple[Array, ...]:
        """Logits of the last valid token and the extended cache."""
        leaves, cache = jax.tree.flatten(self._empty_cache())
        state = dict(zip(self._cache_names(), rest, strict=False))
        values = dict(zip(self._parameters(), rest[len(state) :], strict=True))
        # The static scales among the leaves are constants of the graph.
        inputs = iter(state.values())
        leaves = [next(inputs) if leaf.ndim else leaf for leaf in leaves]
        output = self._model(values)(
            tokens, positions, cache=jax.tree.unflatten(cache, leaves), logits="last"
        )
        extended = [leaf for leaf in jax.tree.leaves(output.cache) if leaf.ndim]
        return (output.logits, *extended)

    def _model(self, values: Mapping[str, Array]) -> Gemma4:
        """The model over these parameters, with marks at its hook points."""
        model = trees.map_weights(
            lambda path, _: self._placed(path, values[path]), Gemma4(self.config, rngs=None)
        )
        for number, hook in enumerate(self.hooks):
            *way, name = hook.split("/")
            owner = functools.reduce(_step, way, model)
            setattr(owner, name, PlacedQuantizer(number))
        return model

    def _placed(self, path: str, value: Array) -> Any:
        if path not in self.rows:
            return value
        is_table = not is_transposed(path, rank=2)
        return PlacedWeight(value, self.rows[path][1], transposed=is_table)

    def _arguments(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every input by name, in order."""
        ids = jax.ShapeDtypeStruct((1, self.length), jnp.int32)
        leaves = [leaf for leaf in jax.tree.leaves(self._empty_cache()) if leaf.ndim]
        state = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in zip(self._cache_names(), leaves, strict=True)
        }
        return {"tokens": ids, "positions": ids} | state | self._parameters()

    def _parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        found = trees.weights(Gemma4(self.config, rngs=None))
        return {
            path: jax.ShapeDtypeStruct(
                self.rows[path][0] if path in self.rows else value.shape, jnp.float32
            )
            for path, (value, _) in found.items()
        }

    def _cache_names(self) -> list[str]:
        owners = [i for i in range(self.config.num_layers) if self.config.owns_kv(i)]
        return [f"kv_cache_{part}_{i}" for i in owners for part in ("k", "v", "positions")]

    def _empty_cache(self) -> KVCache:
        return init_cache(
            self.config,
            batch_size=1,
            max_length=self.cache_length,
            dtype="float32",
            quantization="static" if self.kv_scales else None,
            static_scales=self.kv_scales,
        )


@functools.partial(jax.lax.composite, name=LINEAR)
def _linear(x: Array, rows: Array) -> Array:
    matrix = rows.reshape(-1, x.shape[-1])
    return jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())))


@functools.partial(jax.lax.composite, name=LOOKUP)
def _lookup(ids: Array, rows: Array) -> Array:
    return rows.at[ids].get(mode="clip")


def _step(module: Any, name: str) -> Any:
    return module[int(name)] if name.isdigit() else getattr(module, name)


def optional_module(module: str) -> Any:
    """A module of the optional packages.

    Raises:
        ValueError: it is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from error
