"""The loader: sources to shuffled, packed, resumable batches, with Grain.

Reading order: every source is shuffled anew in each epoch, split and packed by itself; rows of
the sources are interleaved by weight; rows are stacked. All of it is a function of the config and
the seed, and its position is a small dictionary that can be saved with a checkpoint.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from gemmaqat.data.config import DataConfig
from gemmaqat.data.packing import SERIAL, Batch, Row, SplitDocuments, pack, to_batches
from gemmaqat.data.sources import WeightedSource, make_sources
from gemmaqat.data.tokenizer import Tokenizer, make_tokenizer

STATE_VERSION = 1


class Loader(Iterator[Batch]):
    """An endless (split "train") iterator of batches whose position can be saved and restored.

    Attributes:
        tokenizer: the one its tokens come from.
        fingerprint: hash of everything that determines the batches.
    """

    def __init__(self, dataset: grain.IterDataset, tokenizer: Tokenizer, fingerprint: str):
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self._iterator = iter(dataset)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position after the batches given so far, as plain JSON values."""
        return {
            "format_version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "position": self._iterator.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was called, in this process or another.

        Raises:
            ValueError: the state belongs to other data, another seed or a newer version.
        """
        if state.get("format_version") != STATE_VERSION:
            raise ValueError(
                f"data state has format_version {state.get('format_version')!r}, this version "
                f"reads {STATE_VERSION}; use the version of gemmaqat that wrote it."
            )
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "data state was saved with another data set, tokenizer, seed or batch shape "
                f"({state['fingerprint']}, here {self.fingerprint}); restore the files and the "
                "data config of that run, or start in a new work directory."
            )
        self._iterator.set_state(state["position"])


def make_loader(
    data: DataConfig, *, seed: int, split: str = "train", tokenizer: Tokenizer | None = None
) -> Loader:
    """Batches of a data set: endless for "train", one pass in fixed order for "holdout".

    Args:
        data: what to read.
        seed: combined with `data.seed`; another seed is another order (and other tasks).
        split: train or holdout; they share no record and no task prompt.
        tokenizer: in place of the one that `data` names.

    Raises:
        FileNotFoundError: a path or glob matches nothing.
        ValueError: a file is empty, binary, malformed, or has text that the tokenizer does not
            cover; the message names it.
    """
    tokenizer = tokenizer or make_tokenizer(data)
    combined = int(np.random.SeedSequence([data.seed, seed]).generate_state(1)[0])
    rows, sources = _rows(data, tokenizer, seed=combined, split=split)
    fingerprint = _fingerprint(data, tokenizer, sources, combined, split)
    return Loader(rows.batch(data.batch_size, drop_remainder=True), tokenizer, fingerprint)


def holdout(
    data: DataConfig, *, num_sequences: int, tokenizer: Tokenizer | None = None
) -> list[Batch]:
    """At most `num_sequences` packed rows of the hold-out, the same ones in the same order always.

    The last batch is filled up with empty rows (segment id 0, loss weight 0).
    """
    tokenizer = tokenizer or make_tokenizer(data)
    dataset, _ = _rows(data, tokenizer, seed=data.holdout_seed, split="holdout")
    rows: list[Row] = []
    for row in dataset:
        rows.append(row)
        if len(rows) == num_sequences:
            break
    return to_batches(rows, data.batch_size)


def _rows(
    data: DataConfig, tokenizer: Tokenizer, *, seed: int, split: str
) -> tuple[grain.IterDataset, list[WeightedSource]]:
    """Packed rows of the mixture, and the sources they come from."""
    sources = make_sources(data, split, task_seed=seed, tokenizer=tokenizer)
    parts = [
        _packed(part, data, tokenizer, seed=(seed + number) % 2**32, split=split)
        for number, part in enumerate(sources)
    ]
    if len(parts) == 1:
        return parts[0], sources
    return grain.IterDataset.mix(parts, [part.weight for part in sources]), sources


def _packed(
    part: WeightedSource, data: DataConfig, tokenizer: Tokenizer, *, seed: int, split: str
) -> grain.IterDataset:
    documents = grain.MapDataset.source(part.source)
    if not part.endless:
        documents = documents.shuffle(seed=seed)
        if split == "train":
            documents = documents.repeat()
    split_documents = grain.experimental.FlatMapIterDataset(
        documents.to_iter_dataset(SERIAL), SplitDocuments(tokenizer, data.sequence_length)
    )
    return pack(split_documents, data.sequence_length, seed=seed if split == "train" else None)


def _fingerprint(
    data: DataConfig, tokenizer: Tokenizer, sources: list[WeightedSource], seed: int, split: str
) -> str:
    facts = {
        "tokenizer": tokenizer.fingerprint,
        "seed": seed,
        "split": split,
        "shape": (data.batch_size, data.sequence_length),
        "prompt_weight": data.prompt_weight,
        "sources": [(part.source.fingerprint, part.weight) for part in sources],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
