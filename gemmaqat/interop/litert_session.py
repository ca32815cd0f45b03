"""Running an exported `.tflite` in LiteRT's CPU interpreter, token by token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemmaqat.interop.litert_trace import optional_module


class LiteRTSession:
    """One conversation with an exported model: prompts go in, logits come out, the cache stays.

    session = LiteRTSession(folder / "model.tflite")
    logits = session.feed(prompt_ids)
    logits = session.feed([int(logits.argmax())])
    """

    def __init__(self, path: str | Path, *, xnnpack: bool = True):
        """Loads a file.

        Args:
            path: the `.tflite`.
            xnnpack: use the runtime's default delegate; without it every operator runs in the
                interpreter's own kernels.

        Raises:
            ValueError: the runtime is missing or does not accept the file.
        """
        runtime = optional_module("ai_edge_litert.interpreter")
        resolvers = runtime.OpResolverType
        kind = resolvers.AUTO if xnnpack else resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self._interpreter = runtime.Interpreter(
            model_path=str(path), experimental_op_resolver_type=kind
        )
        names = self._interpreter.get_signature_list()
        lengths = {int(name.partition("_")[2]): name for name in names if name != "decode"}
        self._runners = {
            length: self._interpreter.get_signature_runner(name)
            for length, name in (lengths | {1: "decode"}).items()
        }
        self.reset()

    def reset(self) -> None:
        """Empties the cache."""
        self.position = 0
        self._state: dict[str, Any] = {
            name: np.full(
                details["shape"], -1 if "positions" in name else 0, dtype=details["dtype"]
            )
            for name, details in self._runners[1].get_input_details().items()
            if name.startswith("kv_cache")
        }

    def feed(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Reads tokens and returns the logits `[V]` after the last one.

        A prompt goes in pieces: the longest signature as often as it fits, then the shortest that
        holds the rest.
        """
        if not len(tokens):
            raise ValueError("no tokens to read; give at least one.")
        rest, logits = [int(token) for token in tokens], None
        while rest:
            longest = max(self._runners)
            length = min((n for n in self._runners if n >= len(rest)), default=longest)
            piece, rest = rest[:length], rest[length:]
            logits = self._step(piece, length)
        assert logits is not None
        return logits

    def _step(self, piece: Sequence[int], length: int) -> np.ndarray:
        tokens = np.zeros((1, length), np.int32)
        positions = np.full((1, length), -1, np.int32)
        tokens[0, : len(piece)] = piece
        positions[0, : len(piece)] = np.arange(self.position, self.position + len(piece))
        self._state = self._runners[length](tokens=tokens, positions=positions, **self._state)
        self.position += len(piece)
        return self._state.pop("logits")[0, 0]
