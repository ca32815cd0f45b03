"""Documents become rows of fixed length: tokenized, split where too long, packed side by side.

Packing is Grain's first-fit over a window of rows: a document is never cut to fill a gap, only
when it is longer than a row. Every part starts with the beginning-of-text token, which Gemma
needs to work at all; its loss is that of the tokens after it.
"""

from collections.abc import Iterable, Mapping

import grain
import numpy as np

from gemmaqat.data.documents import Document
from gemmaqat.data.tokenizer import Tokenizer

# Fields of a batch, all [B, T]: tokens, targets int32; loss_weights float32; segment_ids int32
# (0 = padding, else which document of the row); positions int32 (-1 = padding, else from 0 in
# every segment).
Batch = dict[str, np.ndarray]
Row = dict[str, np.ndarray]

PACKING_ROWS = 64  # rows open at a time: more pack tighter and mix better, and cost more to resume

# Value of a field where there is no document; fields not named here are 0 there.
_PADDING = {"positions": -1}


def encode_pieces(
    document: Document, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, targets (the token after each) and loss weights of a whole document, [n] each."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in document.pieces:
        piece = tokenizer.encode(text, where=document.where)
        ids += piece
        weights += [weight] * len(piece)
    if ids[:1] == [tokenizer.bos_id]:  # a chat template writes its own
        ids, weights = ids[1:], weights[1:]
    if document.end:
        ids.append(tokenizer.eos_id)
        weights.append(document.pieces[-1].weight)
    targets = np.asarray(ids, np.int32)
    tokens = np.concatenate([np.asarray([tokenizer.bos_id], np.int32), targets[:-1]])
    return tokens, targets, np.asarray(weights, np.float32)


class SplitDocument(grain.experimental.FlatMapTransform):
    """Document to the parts of at most `length` tokens that have something to learn."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self._tokenizer = tokenizer
        self._length = length

    def flat_map(self, element: Document | list[Document]) -> list[Row]:
        """The parts in order; each starts with the beginning-of-text token."""
        documents = [element] if isinstance(element, Document) else element
        return [part for document in documents for part in self._split(document)]

    def _split(self, document: Document) -> list[Row]:
        tokens, targets, weights = encode_pieces(document, self._tokenizer)
        parts = []
        for start in range(0, len(targets), self._length):
            part = slice(start, start + self._length)
            if not weights[part].any():
                continue
            inputs = tokens[part].copy()
            inputs[0] = self._tokenizer.bos_id
            parts.append(
                {"tokens": inputs, "targets": targets[part], "loss_weights": weights[part]}
            )
        return parts


def pack(
    parts: grain.IterDataset, length: int, *, fields: Iterable[str], seed: int | None
) -> grain.IterDataset:
    """Parts to rows of `length`; rows of a window are shuffled unless `seed` is None."""
    packed = grain.experimental.FirstFitPackIterDataset(
        parts,
        length_struct=dict.fromkeys(fields, length),
        num_packing_bins=PACKING_ROWS,
        seed=seed or 0,
        shuffle_bins=seed is not None,
    )
    names = tuple(fields)
    return packed.map(lambda row: _finish_row(row, names))


def _finish_row(row: Mapping[str, np.ndarray], fields: tuple[str, ...]) -> Row:
    """Grain numbers every field's segments alike; keep one copy and mark the padding."""
    segment_ids = row["tokens_segment_ids"]
    finished = {name: row[name] for name in fields}
    finished["segment_ids"] = segment_ids
    finished["positions"] = np.where(
        segment_ids > 0, row["tokens_positions"], _PADDING["positions"]
    )
    return finished


def pack_rows(
    parts: list[Row], length: int, *, padding: Mapping[str, int] | None = None
) -> list[Row]:
    """Packs a finite list of parts, in order; `padding` names values of further fields."""
    if not parts:
        return []
    dataset = grain.MapDataset.source(parts).to_iter_dataset(SERIAL)
    rows = list(pack(dataset, length, fields=parts[0], seed=None))
    for row in rows:
        for name, value in (padding or {}).items():
            row[name] = np.where(
                row["segment_ids"] > 0, row[name], np.asarray(value, row[name].dtype)
            )
    return rows


def to_batches(
    rows: list[Row], batch_size: int, *, padding: Mapping[str, int] | None = None
) -> list[Batch]:
    """Stacks rows; the last batch is filled up with empty rows so that all shapes are equal."""
    if not rows:
        return []
    values = _PADDING | dict(padding or {})
    empty = {name: np.full_like(value, values.get(name, 0)) for name, value in rows[0].items()}
    rows = rows + [empty] * (-len(rows) % batch_size)
    return [
        {name: np.stack([row[name] for row in rows[i : i + batch_size]]) for name in empty}
        for i in range(0, len(rows), batch_size)
    ]


# Reading in this thread: elements are cheap, and the order of work is the same everywhere.
SERIAL = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
