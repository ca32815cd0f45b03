"""Hugging Face folders with quantized tensors: what their readers share.

A reader takes the tensors of every parameter by name; shapes and types are checked when they are
taken, values when they are read. What nobody took is carried, where it is known, or an error.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemmaqat.interop import hf
from gemmaqat.interop.activation_scales import ActivationScales, from_metadata
from gemmaqat.interop.base import companions, of_carried
from gemmaqat.interop.safetensors_file import SafetensorsFile, SafetensorsFolder
from gemmaqat.interop.shipment import CarriedTensor, Piece, Shipment, ShippedTensor
from gemmaqat.interop.source import of_file
from gemmaqat.json_file import read_json
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization import trees
from gemmaqat.quantization.grid import Grid
from gemmaqat.quantization.table import Entry, Table

_COMPARED_ROWS = 4096


class QuantizedFolder:
    """A folder being read.

    Attributes:
        folder: where it is.
        config: the text decoder.
        section: the `quantization_config` of its config.json.
        names: of the tensors.
        metadata: of its files.
        scales: the activation scales found so far, those of the metadata first.
        parameters: shape as deployed files have it, by path, in the order of the model.

    Raises:
        FileNotFoundError, ValueError: as `hf.read_config` and `SafetensorsFolder`; another
            `quant_method`.
    """

    def __init__(self, folder: Path, quant_method: str):
        self.folder = folder
        self.config = hf.read_config(folder)
        self._released = read_json(folder / "config.json")
        self.where = str(folder / "config.json")
        self.section = self._section(quant_method)
        self._tensors = SafetensorsFolder(folder)
        self.prefix = hf.text_prefix(self._tensors, folder)
        self.metadata: dict[str, str] = {}
        for file in dict.fromkeys(self._tensors.files.values()):
            self.metadata |= file.metadata
        self.scales = ActivationScales(self.config, str(folder))
        self.scales.add_all(from_metadata(self.metadata, str(folder)))
        self._weights = trees.weights(abstract_model(self.config))
        self.parameters = {
            path: hf.stored_shape(path, value.shape) for path, (value, _) in self._weights.items()
        }
        self._used: set[str] = set()
        self._found: dict[str, tuple[ShippedTensor, Entry]] = {}
        self._carried: dict[str, CarriedTensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors.files)

    def module(self, path: str) -> str:
        """The whole name of the module of a parameter `<module>/weight`."""
        return self.prefix + hf.tensor_name(path).removesuffix(".weight")

    def columns(self, name: str) -> int:
        """Elements of a row of a tensor; 0 if it has none."""
        shape = self._tensors.entry(name).shape
        return shape[-1] if shape else 0

    def dtype(self, name: str) -> str:
        """Type of a tensor, as safetensors names it."""
        return self._tensors.entry(name).dtype

    def take(
        self, name: str, *, shape: tuple[int, ...], dtypes: tuple[str, ...]
    ) -> tuple[SafetensorsFile, np.ndarray]:
        """A tensor of the file, which must be there with this shape and one of these types.

        Raises:
            ValueError: it is not.
        """
        if name not in self._tensors:
            raise ValueError(
                f"{self.folder}: tensor {name!r} is missing; config.json and weights do not belong "
                "together, or a shard was left out."
            )
        entry = self._tensors.entry(name)
        if tuple(entry.shape) != shape or entry.dtype not in dtypes:
            raise ValueError(
                f"{self._tensors.path(name)}: tensor {name!r} is {entry.dtype} of shape "
                f"{list(entry.shape)}, expected {' or '.join(dtypes)} of shape {list(shape)}; "
                "config.json and weights do not belong together."
            )
        self._used.add(name)
        file = self._tensors.files[name]
        return file, file.array(name)

    def number(self, name: str) -> float:
        """A float tensor of one element."""
        shape = self._tensors.entry(name).shape if name in self._tensors else ()
        if math.prod(shape) != 1:
            shape = ()  # which `take` refuses
        _, array = self.take(name, shape=tuple(shape), dtypes=hf.FLOATS)
        return float(array.reshape(()).astype(np.float32))

    def keep(self, path: str) -> None:
        """Takes a float parameter.

        Raises:
            ValueError: its tensor is missing, of another shape or no float.
        """
        name = self.prefix + hf.tensor_name(path)
        file, _ = self.take(name, shape=self.parameters[path], dtypes=hf.FLOATS)
        self._add(of_file(path, file, name, None, -1), reason="float in the file")

    def quantize(
        self, path: str, grid: Grid, read: Callable[[int, int], Piece], *, rule: int, name: str
    ) -> None:
        """Takes a quantized parameter, whose rows `read` gives."""

        def checked(start: int, stop: int) -> Piece:
            piece = read(start, stop)
            if not np.all(np.isfinite(piece.scales.astype(np.float32))):
                raise ValueError(
                    f"{self.folder}: {path}: a scale in rows {start} to {stop} is not finite; the "
                    "file is damaged, fetch it again."
                )
            return piece

        shape = self.parameters[path]
        dtype = np.dtype(np.float32)
        tensor = ShippedTensor(path=path, shape=shape, grid=grid, dtype=dtype, read=checked)
        self._add(tensor, rule=rule, rule_name=name, grid=grid)

    def same(self, left: str, right: str) -> None:
        """Takes `left`, which must equal a tensor that has been taken.

        Raises:
            ValueError: it does not.
        """
        entry = self._tensors.entry(right)
        _, copy = self.take(left, shape=tuple(entry.shape), dtypes=(entry.dtype,))
        original = self._tensors.files[right].array(right)
        copy, original = (a.reshape(len(a), -1).view(np.uint8) for a in (copy, original))
        for start in range(0, len(copy), _COMPARED_ROWS):
            stop = start + _COMPARED_ROWS
            if not np.array_equal(copy[start:stop], original[start:stop]):
                raise ValueError(
                    f"{self._tensors.path(left)}: {left!r} differs from {right!r}; Gemma 4 ties "
                    "its head to the embedding table, a separate head is not supported."
                )

    def carry(self, name: str) -> None:
        """Passes a tensor on as it is."""
        self._used.add(name)
        self._carried[name] = of_carried(self._tensors.files[name], name)

    def shipment(self, rules: tuple[str, ...], *, activation_rule: int = 0) -> Shipment:
        """Everything that was taken; the rest is carried.

        Raises:
            ValueError: a tensor that nothing accounts for.
        """
        for name in self._tensors:
            if name in self._used:
                continue
            if hf.why_unused(name, self.prefix, self.config) is None:
                raise hf.unknown_tensor(self._tensors, name, self.folder)
            self.carry(name)
        tensors = {path: self._found[path][0] for path in self.parameters}
        entries = tuple(self._found[path][1] for path in self.parameters)
        activations = self.scales.entries(activation_rule, "stored")
        return Shipment(
            config=self.config,
            table=Table(entries, rules, "", activations),
            tensors=tensors | self.scales.tensors(activations),
            carried=self._carried,
            files=companions(self.folder),
            released_config=self._released,
        )

    def _add(self, tensor: ShippedTensor, **decision: Any) -> None:
        value, metadata = self._weights[tensor.path]
        entry = Entry(
            path=tensor.path,
            shape=tuple(value.shape),
            dtype=jnp.dtype(value.dtype).name,
            axis=metadata.get("contraction_axis", -2),
            order="rows" if metadata.get("gather_only") else "contract",
            **decision,
        )
        self._found[tensor.path] = tensor, entry

    def _section(self, quant_method: str) -> dict[str, Any]:
        section = self._released.get("quantization_config")
        if not isinstance(section, dict) or section.get("quant_method") != quant_method:
            found = section.get("quant_method") if isinstance(section, dict) else section
            raise ValueError(
                f"{self.where}: quantization_config.quant_method is {found!r}, expected "
                f"{quant_method!r}."
            )
        return section
