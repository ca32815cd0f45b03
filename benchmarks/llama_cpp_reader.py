"""llama.cpp as a foreign reader: logits, tokens, block formats and its own quantizer, by ctypes.

Comparisons want flash attention off and a float32 cache: both are rounded otherwise.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

_WARNING, _ERROR = 3, 4
_messages: list[tuple[int, str]] = []


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    _messages.append((level, text.decode(errors="replace").strip()))


llama_cpp.llama_log_set(_log, None)
llama_cpp.llama_backend_init()


class Model:
    """A loaded file; a context manager.

    Attributes:
        complaints: warnings and errors of the loader, which goes on in spite of some.
    """

    def __init__(self, path: Path, *, vocabulary_only: bool = False):
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = vocabulary_only
        _messages.clear()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        self.complaints = [text for level, text in _messages if level in (_WARNING, _ERROR)]
        if not self._model:
            raise ValueError(f"{path}: llama.cpp refuses it: {' '.join(self.complaints)}")
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_model_free(self._model)

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 `[T, V]` of one sequence, in one batch."""
        count = len(tokens)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = count
        parameters.n_threads = parameters.n_threads_batch = 2
        parameters.flash_attn_type = 0
        parameters.type_k = parameters.type_v = 0  # float32
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama.cpp could not decode the batch")
            size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
            found = llama_cpp.llama_get_logits(context)
            return np.ctypeslib.as_array(found, (count, size)).copy()
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it recognised, none added."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocabulary, raw, len(raw), ids, room, False, True)
        return ids[:count]


def quantize_file(source: Path, target: Path) -> None:
    """llama.cpp's own conversion to Q4_0, with no option."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.nthread = 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise RuntimeError(f"llama.cpp could not quantize {source}")


_folder = Path(llama_cpp.__file__).parent / "lib"
_ggml = ctypes.CDLL(str(next(_folder.glob("libggml-base.*"))))
_ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
_ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2,
                                      *[ctypes.c_int64] * 3, ctypes.c_void_p]  # fmt: skip
_DEQUANTIZE = {2: "q4_0", 8: "q8_0", 10: "q2_K", 14: "q6_K"}


def quantize(
    rows: np.ndarray, number: int, row_bytes: int, importance: np.ndarray | None = None
) -> np.ndarray:
    """float32 rows to blocks of the type of this number, by ggml; importance is float32 [K]."""
    raw = np.empty((len(rows), row_bytes), np.uint8)
    rows = np.ascontiguousarray(rows, np.float32)
    _ggml.ggml_quantize_chunk(
        number, rows.ctypes.data, raw.ctypes.data, 0, len(rows), rows.shape[1],
        None if importance is None else importance.ctypes.data,
    )  # fmt: skip
    return raw


def dequantize(raw: np.ndarray, number: int, row_length: int) -> np.ndarray:
    """Blocks to float32 rows, by ggml."""
    function = getattr(_ggml, f"dequantize_row_{_DEQUANTIZE[number]}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    rows = np.empty((len(raw), row_length), np.float32)
    raw = np.ascontiguousarray(raw)
    function(raw.ctypes.data, rows.ctypes.data, rows.size)
    return rows
