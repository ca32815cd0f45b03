"""Where shipments come from and what becomes of them: models, folders of floats, models again.

A float folder is quantized as it is read, some rows at a time, so its largest table never exists
as a whole. The codes are those that `convert` gives the same weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemmaqat.interop import hf
from gemmaqat.interop.base import companions, of_carried, read_base
from gemmaqat.interop.packed_folder import load_packed, read_table
from gemmaqat.interop.safetensors_file import SafetensorsFile
from gemmaqat.interop.shipment import TOKEN_TABLE, Piece, Shipment, ShippedTensor
from gemmaqat.json_file import read_json
from gemmaqat.models.transformer import Gemma4
from gemmaqat.packed import PackedTensor, pack
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.activations import prepare
from gemmaqat.quantization.grids import TENSOR, Grid, quantize
from gemmaqat.quantization.table import SCALE, Table

PIECE_BYTES = 1 << 24  # of the float32 values of one piece
_BATCH = 1 << 20  # weights quantized by one call of the compiled program


def pieces(
    tensor: ShippedTensor, *, num_bytes: int = PIECE_BYTES
) -> Iterator[tuple[int, int, Any]]:
    """All rows of a tensor in order, as `(start, stop, what tensor.read gives)`."""
    rows = max(1, num_bytes // (4 * max(1, tensor.row_length)))
    for start in range(0, tensor.num_rows, rows):
        stop = min(start + rows, tensor.num_rows)
        yield start, stop, tensor.read(start, stop)


def values(tensor: ShippedTensor, piece: Any) -> np.ndarray:
    """The float32 weights `[R, K]` of what `tensor.read` gave."""
    if tensor.grid is None:
        return np.asarray(piece, np.float32)
    codes = piece.codes.astype(np.float32) + (0.5 if tensor.grid.levels == "half" else 0.0)
    scales = piece.scales.astype(np.float32)
    blocks = codes.reshape(len(codes), scales.shape[1], -1)
    return (blocks * scales[:, :, None]).reshape(codes.shape)


def of_model(model: Gemma4, table: Table, *, files: Mapping[str, Path] | None = None) -> Shipment:
    """A converted model in memory, as `convert` or a reader gives it.

    Args:
        model: its quantized parameters are `PackedTensor`s.
        table: what it was converted by.
        files: companions to pass on, by name.

    Raises:
        ValueError: a parameter is not stored as the table says.
    """
    entries, tensors = table.by_path, {}
    for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = "/".join(map(str, keys))
        value, entry = variable.get_value(), entries.get(path)
        grid = entry.grid if entry is not None else None
        if isinstance(value, PackedTensor) != (grid is not None):
            stored = "packed" if isinstance(value, PackedTensor) else "in float"
            raise ValueError(
                f"{path}: stored {stored}, the table says "
                f"{grid.describe() if grid else 'float'}; convert the model by this table first."
            )
        tensors[path] = _of_packed(path, value, grid) if grid else _of_array(path, value)
    missing = [entry.path for entry in table.entries if entry.path not in tensors]
    if missing:
        raise ValueError(f"{missing[0]}: in the table, not in the model; they do not go together.")
    return Shipment(config=model.config, table=table, tensors=tensors, files=dict(files or {}))


def of_folder(folder: str | Path, table: Table) -> Shipment:
    """A Hugging Face folder of floats, rounded to the table as it is read.

    Tensors that are no parameters are carried; a second copy of a table that is quantized is not,
    for it would contradict the codes.

    Raises:
        FileNotFoundError, ValueError: the folder is no intact checkpoint, or not the table's.
    """
    folder = Path(folder)
    opened = hf.open_folder(folder)
    differing = table.by_path.keys() ^ opened.keys.keys()
    if differing:
        raise ValueError(
            f"{folder}: parameter {min(differing)!r} is not in both the checkpoint and the table; "
            "resolve the rules for this checkpoint."
        )
    tensors = {}
    for path, key in opened.keys.items():
        entry, file = table.by_path[path], opened.tensors.files[key]
        stored = opened.tensors.entry(key)
        if tuple(stored.shape) != hf.stored_shape(path, entry.shape):
            raise ValueError(
                f"{folder}: {key} has shape {list(stored.shape)}, the table is for a parameter of "
                f"shape {list(entry.shape)}; resolve the rules for this checkpoint."
            )
        tensors[path] = of_file(path, file, key, entry.grid, entry.axis)
    for activation in table.activations:  # off where nothing has calibrated it
        path = f"{activation.path}/{SCALE}"
        tensors[path] = _of_array(path, np.float32(activation.constant or 0))
    table_is_kept = table.by_path[TOKEN_TABLE].grid is None
    carried = {
        name: of_carried(opened.tensors.files[name], name)
        for name, reason in opened.rest.items()
        if reason != hf.TIED_HEAD or table_is_kept
    }
    return Shipment(
        config=opened.config,
        table=table,
        tensors=tensors,
        carried=carried,
        files=companions(folder),
        released_config=read_json(folder / "config.json"),
    )


def of_packed_folder(folder: str | Path) -> Shipment:
    """A folder that `save_packed` wrote, with all that was kept of its checkpoint."""
    folder = Path(folder)
    shipment = of_model(load_packed(folder), read_table(folder), files=companions(folder))
    base = read_base(folder)
    return base.added_to(shipment) if base else shipment


def to_model(shipment: Shipment, *, dtype: Any = "float32", param_dtype: Any = None) -> Gemma4:
    """The model of a shipment: packed where there is a grid.

    Args:
        shipment: from any source.
        dtype: of the computation.
        param_dtype: of the kept parameters; None = `dtype`.
    """
    config = dataclasses.replace(
        shipment.config,
        dtype=jnp.dtype(dtype).name,
        param_dtype=jnp.dtype(param_dtype or dtype).name,
    )
    graphdef, state = nnx.split(prepare(abstract_model(config), shipment.table))
    entries, flat = shipment.table.by_path, {}
    for keys, variable in nnx.to_flat_state(state):
        path = "/".join(map(str, keys))
        tensor = shipment.tensors[path]
        if tensor.grid is None:
            value: Any = jnp.array(_swapped(path, _whole(tensor)), dtype=variable.dtype)
        else:
            value = _packed(tensor, axis=entries[path].axis, order=entries[path].order)
        flat[keys] = variable.replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _whole(tensor: ShippedTensor) -> np.ndarray:
    """All floats of a kept tensor, in its shape."""
    rows = tensor.read(0, tensor.num_rows)
    return np.asarray(rows).reshape(tensor.shape)


def _packed(tensor: ShippedTensor, *, axis: int, order: Any) -> PackedTensor:
    """All codes and scales of a quantized tensor, as the kernels want them."""
    grid = tensor.grid
    assert grid is not None
    piece = tensor.read(0, tensor.num_rows)
    codes = np.asarray(piece.codes).reshape(tensor.shape)
    scales = np.asarray(piece.scales).reshape(*tensor.shape[:-1], -1)
    if grid.block == TENSOR:
        scales = scales[..., :1, :]
    if axis == -2:
        codes, scales = np.swapaxes(codes, -1, -2), np.swapaxes(scales, -1, -2)
    return pack(
        jnp.asarray(codes),
        jnp.asarray(scales),
        bits=grid.bits,
        axis=axis,
        order=order,
        levels=grid.levels,  # type: ignore[arg-type]
    )


def _swapped(path: str, array: np.ndarray) -> np.ndarray:
    """Between our `[in, out]` and the `[out, in]` of files, either way."""
    return np.swapaxes(array, -1, -2) if hf.is_transposed(path, array.ndim) else array


def by_matrix(
    start: int, stop: int, rows: int, read: Callable[[int, int, int], np.ndarray]
) -> np.ndarray:
    """Rows of a stack of matrices of `rows` each; `read(matrix, first, last)` gives a range."""
    parts = []
    while start < stop:
        matrix, first = divmod(start, rows)
        last = min(rows, first + stop - start)
        parts.append(read(matrix, first, last))
        start += last - first
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _of_array(path: str, value: Any) -> ShippedTensor:
    array = _swapped(path, np.asarray(value))
    shape, dtype = array.shape, array.dtype
    if array.ndim < 2:
        return ShippedTensor(
            path=path, shape=shape, grid=None, dtype=dtype,
            read=lambda start, stop: array.reshape(1, -1)[start:stop],
        )  # fmt: skip
    stack = array.reshape(-1, *shape[-2:]) if array.ndim > 2 else array[None]

    def read(start: int, stop: int) -> np.ndarray:
        cut = lambda matrix, first, last: stack[matrix, first:last]  # noqa: E731
        return np.ascontiguousarray(by_matrix(start, stop, shape[-2], cut))

    return ShippedTensor(path=path, shape=shape, grid=None, dtype=dtype, read=read)


def _of_packed(path: str, value: PackedTensor, grid: Grid) -> ShippedTensor:
    shape = value.shape if value.transposed else (*value.shape[:-2], *value.shape[:-3:-1])
    out, length = shape[-2:]
    # [matrices, words or scales of a row, rows], whatever the order in memory
    words, scales = np.asarray(value.words), np.asarray(value.scales)
    if value.order == "rows":
        words, scales = np.swapaxes(words, -1, -2), np.swapaxes(scales, -1, -2)
    words, scales = (a.reshape(-1, *a.shape[-2:]) for a in (words, scales))
    scales = np.broadcast_to(scales, (*scales.shape[:-1], out))
    bits = value.bits

    def read_codes(matrix: int, first: int, last: int) -> np.ndarray:
        return _unpack(words[matrix, :, first:last].T, bits)[:, :length]

    def read_scales(matrix: int, first: int, last: int) -> np.ndarray:
        return scales[matrix, :, first:last].T

    def read(start: int, stop: int) -> Piece:
        return Piece(
            np.ascontiguousarray(by_matrix(start, stop, out, read_codes)),
            np.ascontiguousarray(by_matrix(start, stop, out, read_scales)),
        )

    return ShippedTensor(path=path, shape=shape, grid=grid, dtype=np.dtype(np.float32), read=read)


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int8 codes `[R, W * 32 / bits]` of words `[R, W]`, in the layout of `kernels.layout`."""
    data = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        return data.view(np.int8)
    fields = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (data[:, :, None] >> fields) & np.uint8(2**bits - 1)
    return (codes.astype(np.int8) - np.int8(1 << (bits - 1))).reshape(len(data), -1)


def of_file(
    path: str, file: SafetensorsFile, key: str, grid: Grid | None, axis: int
) -> ShippedTensor:
    """One tensor of a mapped file; its pages are dropped once the last row has been read."""
    shape = tuple(file.tensors[key].shape)
    rows = file.array(key).reshape(-1, shape[-1]) if len(shape) > 1 else None
    dtype = file.array(key).dtype
    num_rows = 1 if rows is None else len(rows)

    def floats(start: int, stop: int) -> np.ndarray:
        part = file.array(key).reshape(1, -1) if rows is None else rows
        return part[start:stop]

    def read(start: int, stop: int) -> Any:
        if grid is None:
            result: Any = np.array(floats(start, stop))
        elif grid.block == TENSOR:
            result = _quantize_matrices(path, floats, start, stop, shape[-2], grid)
        else:
            result = _quantize_rows(path, floats(start, stop), grid, axis)
        if stop == num_rows:
            file.forget(key)
        return result

    return ShippedTensor(path=path, shape=shape, grid=grid, dtype=dtype, read=read)


def _quantize_rows(path: str, rows: np.ndarray, grid: Grid, axis: int) -> Piece:
    """Codes and scales of some rows, in batches of one shape so that one program serves them."""
    length = rows.shape[1]
    size = max(1, _BATCH // length)
    codes = np.empty(rows.shape, np.int8)
    scales = np.empty((len(rows), grid.num_blocks(length)), jnp.dtype(grid.scale_dtype))
    for i in range(0, len(rows), size):
        batch = np.zeros((size, length), rows.dtype)
        part = rows[i : i + size]
        batch[: len(part)] = part
        found = _quantize_batch(batch, grid, axis)
        codes[i : i + size] = np.asarray(found.codes)[: len(part)]
        scales[i : i + size] = np.asarray(found.scales)[: len(part)]
    if not np.all(np.isfinite(scales.astype(np.float32))):
        raise ValueError(
            f"{path}: the weight holds NaN or infinity, or is too large for {grid.scale_dtype} "
            "scales; fetch the checkpoint again or take an earlier one."
        )
    return Piece(codes, scales)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_batch(rows: jax.Array, grid: Grid, axis: int) -> Piece:
    if axis == -1:
        return Piece(*quantize(rows, grid, axis=-1))
    # Sums along the axis that `convert` sums along.
    codes, scales = quantize(rows.T, grid, axis=-2)
    return Piece(codes.T, scales.T)


def _quantize_matrices(
    path: str,
    floats: Callable[[int, int], np.ndarray],
    start: int,
    stop: int,
    rows: int,
    grid: Grid,
) -> Piece:
    """Rows of matrices that have one scale each: the whole matrix is needed to find it."""
    found: dict[int, Piece] = {}

    def part(field: int) -> Callable[[int, int, int], np.ndarray]:
        def cut(matrix: int, first: int, last: int) -> np.ndarray:
            if matrix not in found:
                whole = floats(matrix * rows, (matrix + 1) * rows)
                codes, scales = quantize(jnp.asarray(whole).T, grid, axis=-2)
                found[matrix] = Piece(
                    np.asarray(codes).T, np.broadcast_to(np.asarray(scales), (rows, 1))
                )
            return found[matrix][field][first:last]

        return cut

    piece = Piece(*(by_matrix(start, stop, rows, part(field)) for field in (0, 1)))
    if not np.all(np.isfinite(piece.scales.astype(np.float32))):
        raise ValueError(f"{path}: the weight holds NaN or infinity; take an earlier checkpoint.")
    return piece
