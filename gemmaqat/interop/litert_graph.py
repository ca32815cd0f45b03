"""One LiteRT model of several converted signatures, with our weights and quantizers in it.

What the converter left open is filled in here, in its own flatbuffer objects: parameters turn from
inputs into constants with our scales, all signatures sharing one copy; composites turn into the
operators below. The codes themselves follow the flatbuffer as raw bytes.

    lookup                   EMBEDDING_LOOKUP of codes: only the wanted rows become floats
    linear, float weight     FULLY_CONNECTED
    linear, codes            DEQUANTIZE, once for all calls, then FULLY_CONNECTED in float32; or
                             (dynamic) FULLY_CONNECTED of floats and codes, for which the runtime
                             quantizes every row of activations to 8 bits
    linear between two       QUANTIZE, integer FULLY_CONNECTED, DEQUANTIZE: 8-bit activations times
    activations              codes, summed in integers
    activation               QUANTIZE and DEQUANTIZE
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemmaqat.interop.litert_trace import ACTIVATION, LINEAR, LOOKUP, optional_module

IDENTIFIER = b"TFL3"
ALIGNMENT = 64  # bytes; of every weight in the file

# The newest versions of these operators that runtime 2.3 has kernels for and that we need.
_VERSIONS = {"QUANTIZE": 2, "DEQUANTIZE": 6, "FULLY_CONNECTED": 12, "EMBEDDING_LOOKUP": 4}
_CODE_TYPES = {2: "INT2", 4: "INT4", 8: "INT8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """How one parameter lies in the file.

    Attributes:
        shape: of the stored tensor; that of a quantized one is `[rows, codes under one scale]`.
        row_length: codes of a row of the matrix; more than `shape[1]` where it is cut in blocks.
        bits: of a stored code, 2, 4 or 8; 0 = float32.
        scales: float32, one per stored row; None = float32 values.
    """

    shape: tuple[int, ...]
    row_length: int
    bits: int = 0
    scales: np.ndarray | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of codes or floats in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * (self.bits or 32) // 8


@dataclasses.dataclass(frozen=True)
class Assembled:
    """The start of the file, and where in the file each weight's bytes belong."""

    head: bytes  # the flatbuffer and its small constants
    offsets: Mapping[str, int]


def assemble(
    signatures: Mapping[str, bytes],
    weights: Mapping[str, StoredWeight],
    *,
    hooks: Sequence[tuple[str, float]],
    dynamic: bool,
    metadata: bytes,
) -> Assembled:
    """Joins converted signatures into one model.

    Args:
        signatures: name to flatbuffer, as `Program.convert` gives it.
        weights: every parameter.
        hooks: path and scale of the quantized activations, by their number in the program.
        dynamic: leave 8-bit quantization of float activations to the runtime.
        metadata: stored under the name `gemmaqat`.
    """
    schema = optional_module("litert_converter.schema_py_generated")
    model = _Model(schema, weights, hooks, dynamic)
    for name, flatbuffer in signatures.items():
        model.add_signature(name, flatbuffer)
    model.add_metadata("gemmaqat", metadata)
    return model.pack()


class _Model:
    """The model under construction."""

    def __init__(
        self,
        schema: Any,
        weights: Mapping[str, StoredWeight],
        hooks: Sequence[tuple[str, float]],
        dynamic: bool,
    ):
        self.schema, self.weights, self.hooks, self.dynamic = schema, weights, hooks, dynamic
        self.out = schema.ModelT()
        self.out.version = 3
        self.out.description = "gemmaqat"
        self.out.buffers = [schema.BufferT()]  # number 0 means "none"
        self.out.operatorCodes, self.out.subgraphs = [], []
        self.out.signatureDefs, self.out.metadata = [], []
        self.constants: dict[int, bytes] = {}  # small ones, by number of their buffer
        self.buffers = {path: self._new_buffer(w.num_bytes) for path, w in weights.items()}
        self.quantizations = {
            path: _shared_quantization(schema, weight.scales)
            for path, weight in weights.items()
            if weight.scales is not None
        }
        self._codes: dict[tuple[int, bytes, int], int] = {}

    def add_signature(self, name: str, flatbuffer: bytes) -> None:
        """Adds the first subgraph of a converted signature; the others are its composites."""
        source = self.schema.ModelT.InitFromPackedBuf(flatbuffer, 0)
        signature, graph = source.signatureDefs[0], _Graph(self, source)
        graph.place_weights(signature)
        graph.graph.name = name
        signature.subgraphIndex = self.add_graph(graph)
        self.out.signatureDefs.append(signature)

    def add_graph(self, graph: "_Graph") -> int:
        """Finishes a subgraph and those it calls; its number."""
        number = len(self.out.subgraphs)
        self.out.subgraphs.append(graph.graph)
        graph.rewrite()
        return number

    def add_metadata(self, name: str, data: bytes) -> None:
        """Adds bytes that the runtime passes over."""
        entry = self.schema.MetadataT()
        entry.name, entry.buffer = name, self.add_constant(data)
        self.out.metadata.append(entry)

    def add_constant(self, data: bytes) -> int:
        """Adds a small constant; the number of its buffer."""
        buffer = self._new_buffer(len(data))
        self.constants[buffer] = data
        return buffer

    def code(self, builtin: int, custom: bytes | None, version: int) -> int:
        """Number of an operator's code."""
        key = (builtin, custom or b"", version)
        if key not in self._codes:
            code = self.schema.OperatorCodeT()
            code.builtinCode, code.customCode, code.version = builtin, custom, version
            code.deprecatedBuiltinCode = min(builtin, 127)
            self.out.operatorCodes.append(code)
            self._codes[key] = len(self._codes)
        return self._codes[key]

    def pack(self) -> Assembled:
        """Lays out the file: flatbuffer, constants, weights.

        Bytes within the flatbuffer would not be aligned as kernels want them, nor could they be
        written piece by piece. It is packed twice: offsets take the same room whatever they are.
        """
        size = position = len(self._packed())
        places = {}
        weights = {self.buffers[path]: path for path in self.weights}
        for number in [*self.constants, *weights]:
            buffer = self.out.buffers[number]
            places[number] = buffer.offset = position = _aligned(position)
            position += buffer.size
        head = bytearray(self._packed())
        assert len(head) == size, "offsets changed the size of the flatbuffer"
        for number, data in self.constants.items():
            head += bytes(places[number] - len(head)) + data
        return Assembled(bytes(head), {path: places[number] for number, path in weights.items()})

    def _packed(self) -> bytes:
        builder = optional_module("flatbuffers").Builder(1 << 20)
        builder.Finish(self.out.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _new_buffer(self, size: int) -> int:
        buffer = self.schema.BufferT()
        buffer.offset, buffer.size = ALIGNMENT, size  # 0, the default, would take no room
        self.out.buffers.append(buffer)
        return len(self.out.buffers) - 1


class _Graph:
    """One signature's subgraph on its way from converted to final."""

    def __init__(self, model: _Model, source: Any, number: int = 0):
        self.model, self.source = model, source
        self.graph = source.subgraphs[number]
        self.paths: dict[int, str] = {}  # tensors that are parameters
        self.floats: dict[str, int] = {}  # parameters whose codes became floats already
        self.codes_of: dict[int, int] = {}  # float tensor -> its 8-bit codes
        for tensor in self.graph.tensors:
            data = source.buffers[tensor.buffer].data
            tensor.buffer = 0 if data is None else model.add_constant(data.tobytes())

    def place_weights(self, signature: Any) -> None:
        """Makes constants of the inputs that are parameters."""
        kept = []
        for entry in signature.inputs:
            path = entry.name.decode()
            if path not in self.model.weights:
                kept.append(entry)
                continue
            weight, tensor = self.model.weights[path], self.graph.tensors[entry.tensorIndex]
            self.paths[entry.tensorIndex] = path
            tensor.name, tensor.buffer = path, self.model.buffers[path]
            if weight.bits:
                tensor.type = self._type(_CODE_TYPES[weight.bits])
                tensor.quantization = self.model.quantizations[path]
        missing = self.model.weights.keys() - self.paths.values()
        assert not missing, f"not an input of the graph: {missing}"
        signature.inputs = kept
        inputs = [i for i in self.graph.inputs if i not in self.paths]
        self.graph.inputs = np.array(inputs, np.int32)

    def rewrite(self) -> None:
        """Replaces composites and renumbers the operators' codes."""
        converted, self.graph.operators = self.graph.operators, []
        readers = _readers(converted)
        for op in converted:
            name = _composite(op)
            if name == LINEAR:
                self._linear(op, readers)
            elif name == LOOKUP:
                self._emit("EMBEDDING_LOOKUP", op.inputs.tolist(), int(op.outputs[0]))
            elif name.startswith(ACTIVATION):
                self._activation(op)
            else:
                self._copy(op)
        self._drop_unread()

    def _copy(self, op: Any) -> None:
        code = self.source.operatorCodes[op.opcodeIndex]
        op.opcodeIndex = self.model.code(code.builtinCode, code.customCode, code.version)
        if hasattr(op.builtinOptions2, "updateComputationSubgraphIndex"):
            options = op.builtinOptions2  # a scatter; what it does with old and new is a graph
            body = _Graph(self.model, self.source, options.updateComputationSubgraphIndex)
            options.updateComputationSubgraphIndex = self.model.add_graph(body)
        self.graph.operators.append(op)

    def _linear(self, op: Any, readers: Mapping[int, list[Any]]) -> None:
        (x, w), y = map(int, op.inputs), int(op.outputs[0])
        weight = self.model.weights[self.paths[w]]
        per_channel = bool(weight.bits) and weight.shape[1] == weight.row_length
        hooks = [_hook_number(reader) for reader in readers.get(y, [])]
        if per_channel and x in self.codes_of and len(hooks) == 1 and hooks[0] is not None:
            self.codes_of[y] = self._codes_tensor(y, hooks[0])
            self._emit("FULLY_CONNECTED", [self.codes_of[x], w, -1], self.codes_of[y])
            return
        if weight.bits and not (per_channel and self.model.dynamic):
            w = self._dequantized(w)
        self._emit("FULLY_CONNECTED", [x, w, -1], y)

    def _activation(self, op: Any) -> None:
        x, y = int(op.inputs[0]), int(op.outputs[0])
        codes = self.codes_of.get(x)
        if codes is None:
            number = _hook_number(op)
            assert number is not None
            codes = self._codes_tensor(x, number)
            self._emit("QUANTIZE", [x], codes)
        self._emit("DEQUANTIZE", [codes], y)
        self.codes_of[y] = codes

    def _dequantized(self, w: int) -> int:
        """The float matrix of a parameter's codes; the runtime keeps what it makes of constants."""
        path = self.paths[w]
        if path not in self.floats:
            weight = self.model.weights[path]
            tensor = self._tensor(f"{path}/float", weight.shape, "FLOAT32")
            self._emit("DEQUANTIZE", [w], tensor)
            if weight.shape[1] != weight.row_length:
                shape = np.array([-1, weight.row_length], np.int32)
                shape[0] = np.prod(weight.shape) // weight.row_length
                target = self._tensor(f"{path}/shape", (2,), "INT32")
                self.graph.tensors[target].buffer = self.model.add_constant(shape.tobytes())
                blocks, tensor = tensor, self._tensor(f"{path}/matrix", shape, "FLOAT32")
                self._emit("RESHAPE", [blocks, target], tensor)
            self.floats[path] = tensor
        return self.floats[path]

    def _codes_tensor(self, like: int, hook: int) -> int:
        """A tensor for the 8-bit codes of an activation, named after its hook point."""
        path, scale = self.model.hooks[hook]
        tensor = self._tensor(path, self.graph.tensors[like].shape, "INT8")
        quantization = self.model.schema.QuantizationParametersT()
        quantization.scale = np.array([scale], np.float32)
        quantization.zeroPoint = np.zeros(1, np.int64)
        self.graph.tensors[tensor].quantization = quantization
        return tensor

    def _tensor(self, name: str, shape: Any, kind: str) -> int:
        tensor = self.model.schema.TensorT()
        tensor.name, tensor.shape = name, np.array(shape, np.int32)
        tensor.type, tensor.buffer = self._type(kind), 0
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def _emit(self, kind: str, inputs: Sequence[int], output: int) -> None:
        schema = self.model.schema
        op = schema.OperatorT()
        builtin = getattr(schema.BuiltinOperator, kind)
        op.opcodeIndex = self.model.code(builtin, None, _VERSIONS.get(kind, 1))
        op.inputs, op.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        if kind == "FULLY_CONNECTED":
            op.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
            op.builtinOptions = schema.FullyConnectedOptionsT()
            op.builtinOptions.keepNumDims = True
        self.graph.operators.append(op)

    def _drop_unread(self) -> None:
        """Removes conversions to floats that integer products made needless."""
        read = {i for op in self.graph.operators for i in op.inputs} | set(self.graph.outputs)
        self.graph.operators = [
            op
            for op in self.graph.operators
            if op.outputs[0] in read or op.outputs[0] not in self.codes_of
        ]

    def _type(self, name: str) -> int:
        return getattr(self.model.schema.TensorType, name)


def _shared_quantization(schema: Any, scales: np.ndarray) -> Any:
    """Scales that every tensor naming them points to, written into the file once."""

    class Shared(schema.QuantizationParametersT):
        written: tuple[Any, int] | None = None

        def Pack(self, builder: Any) -> int:  # noqa: N802
            if self.written is None or self.written[0] is not builder:
                self.written = (builder, super().Pack(builder))
            return self.written[1]

    shared = Shared()
    shared.scale = np.ascontiguousarray(scales, np.float32)
    # All zero, yet the runtime asks for as many as there are scales.
    shared.zeroPoint = np.zeros(scales.size, np.int64)
    shared.quantizedDimension = 0
    return shared


def _readers(operators: Sequence[Any]) -> dict[int, list[Any]]:
    """Tensor to the operators that read it."""
    readers: dict[int, list[Any]] = {}
    for op in operators:
        for tensor in op.inputs:
            readers.setdefault(int(tensor), []).append(op)
    return readers


def _composite(op: Any) -> str:
    """Name of a composite, "" of any other operator."""
    name = getattr(op.builtinOptions2, "name", None)
    return name.decode() if name else ""


def _hook_number(op: Any) -> int | None:
    """Number of the hook point of a quantized activation, None of another operator."""
    name = _composite(op)
    return int(name.rpartition(".")[2]) if name.startswith(ACTIVATION) else None


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
