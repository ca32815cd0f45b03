"""A byte-level BPE trained on the training split, once, and kept in the user's cache."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from gemmaqat.data.config import DataConfig
from gemmaqat.data.sources import make_sources

TRAINING_BYTES = 4 * 2**20  # of text, spread over the data; more changes a small BPE little
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>")  # ids 0, 1, 2 as in Gemma


def trained_bpe(config: DataConfig) -> Path:
    """Path of the `tokenizer.json` for the data of `config`; trains it if it is not there yet.

    The name holds a hash of the text and of the number of entries, so other data or another
    setting is another file, and a copy can be given as `data.tokenizer` anywhere else.

    Raises:
        ValueError: the vocabulary is too small to hold all bytes, or the data cannot be read.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if config.bpe_vocab_size < least:
        raise ValueError(
            f"data.bpe_vocab_size: {config.bpe_vocab_size} is below {least}, the entries that "
            "bytes and special tokens take."
        )
    texts = list(_sample(config))
    digest = hashlib.sha256(f"{config.bpe_vocab_size}".encode())
    for text in texts:
        digest.update(text.encode())
    path = (
        cache_dir() / "tokenizers" / f"bpe-{config.bpe_vocab_size}-{digest.hexdigest()[:16]}.json"
    )
    if not path.is_file():
        logging.info("Training a BPE of %d entries, kept in %s", config.bpe_vocab_size, path)
        _train(texts, config.bpe_vocab_size, path)
    return path


def cache_dir() -> Path:
    """`$GEMMAQAT_CACHE`, or `gemmaqat` in the user's cache folder."""
    chosen = os.environ.get("GEMMAQAT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemmaqat"


def _sample(config: DataConfig) -> Iterator[str]:
    """Texts of every source, evenly spaced, an equal number of bytes from each."""
    sources = make_sources(config, "train", task_seed=0)
    budget = TRAINING_BYTES // len(sources)
    for part in sources:
        count = 1_000 if part.endless else len(part.source)
        taken = 0
        for index in _spread(count):
            for document in part.source[index]:
                text = "".join(piece.text for piece in document.pieces)
                taken += len(text.encode())
                yield text
            if taken >= budget:
                break


def _spread(count: int) -> Iterator[int]:
    """All of range(count), in large strides first, so that any beginning covers all of it."""
    stride = 64
    for start in range(stride):
        yield from range(start, count, stride)


def _train(texts: list[str], vocab_size: int, path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that another process never reads half a file.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
        file.write(tokenizer.to_str())
    os.replace(file.name, path)
