"""Documents become rows of fixed length: tokenized, split where too long, packed side by side.

Packing is Grain's first-fit over a window of rows: a document is never cut to fill a gap, only
when it is longer than a row. Every part starts with the beginning-of-text token, which Gemma
needs to work at all; its loss is that of the tokens after it.
"""

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from gemmaqat.data.documents import Document
from gemmaqat.data.tokenizer import Tokenizer

# Fields of a batch, all [B, T]: tokens, targets int32; loss_weights float32; segment_ids int32
# (0 = padding, else which document of the row); positions int32 (-1 = padding, else from 0 in
# every segment).
Batch = dict[str, np.ndarray]
Row = dict[str, np.ndarray]

# A part of a document is one array [n] of such triples; Grain then packs one feature, not three.
TOKEN_DTYPE = np.dtype([("tokens", "i4"), ("targets", "i4"), ("loss_weights", "f4")])

PACKING_ROWS = 64  # rows open at a time: more pack tighter and mix better, and cost more to resume

# Reading in this thread: elements are cheap, and the order of work is the same everywhere.
SERIAL = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """The whole document as TOKEN_DTYPE [n]: each token, the one after it, and its loss weight."""
    ids: list[int] = []
    weights: list[float] = []
    before = ""
    for text, weight in document.pieces:
        piece = tokenizer.encode(text, after=before, where=document.where)
        ids += piece
        weights += [weight] * len(piece)
        before = text
    if ids[:1] == [tokenizer.bos_id]:  # a chat template writes its own
        del ids[0], weights[0]
    if document.end:
        ids.append(tokenizer.eos_id)
        weights.append(document.pieces[-1].weight)
    encoded = np.empty(len(ids), TOKEN_DTYPE)
    encoded["targets"] = ids
    encoded["tokens"] = [tokenizer.bos_id, *ids][: len(ids)]
    encoded["loss_weights"] = weights
    return encoded


class SplitDocuments(grain.experimental.FlatMapTransform):
    """Documents to the parts of at most `length` tokens that have something to learn."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self._tokenizer = tokenizer
        self._length = length

    def flat_map(self, element: list[Document]) -> list[np.ndarray]:
        """The parts in order; each starts with the beginning-of-text token."""
        parts = []
        for document in element:
            encoded = encode(document, self._tokenizer)
            for start in range(0, len(encoded), self._length):
                part = encoded[start : start + self._length]
                if part["loss_weights"].any():
                    part["tokens"][0] = self._tokenizer.bos_id
                    parts.append(part)
        return parts


def pack(parts: grain.IterDataset, length: int, *, seed: int | None) -> grain.IterDataset:
    """Parts to rows of `length`; rows of a window are shuffled unless `seed` is None.

    Every field of a part's dtype becomes a field of the row, beside segment_ids and positions.
    """
    packed = grain.experimental.FirstFitPackIterDataset(
        parts.map(lambda part: {"part": part}),
        length_struct={"part": length},
        num_packing_bins=PACKING_ROWS,
        seed=seed or 0,
        shuffle_bins=seed is not None,
    )
    return packed.map(_finish_row)


def pack_all(
    parts: list[np.ndarray], length: int, batch_size: int, *, padding: Mapping[str, Any]
) -> list[Batch]:
    """Packs a finite list of parts, in order, into full batches.

    `padding` holds the values of further fields where there is no document.
    """
    if not parts:
        return []
    rows = list(pack(grain.MapDataset.source(parts).to_iter_dataset(SERIAL), length, seed=None))
    for row in rows:
        for name, value in padding.items():
            row[name][row["segment_ids"] == 0] = value
    return to_batches(rows, batch_size, padding=padding)


def to_batches(
    rows: list[Row], batch_size: int, *, padding: Mapping[str, Any] | None = None
) -> list[Batch]:
    """Stacks rows; the last batch is filled up with empty rows so that all shapes are equal."""
    if not rows:
        return []
    values = _PADDING | dict(padding or {})
    empty = {name: np.full_like(field, values.get(name, 0)) for name, field in rows[0].items()}
    rows = rows + [empty] * (-len(rows) % batch_size)
    return [
        {name: np.stack([row[name] for row in rows[i : i + batch_size]]) for name in empty}
        for i in range(0, len(rows), batch_size)
    ]


# Value of a field where there is no document; fields not named here are 0 there.
_PADDING = {"positions": -1}


def _finish_row(row: Mapping[str, np.ndarray]) -> Row:
    part, segment_ids = row["part"], row["part_segment_ids"]
    fields = {name: np.ascontiguousarray(part[name]) for name in part.dtype.fields or ()}
    positions = np.where(segment_ids > 0, row["part_positions"], np.int32(_PADDING["positions"]))
    return fields | {"segment_ids": segment_ids, "positions": positions}
