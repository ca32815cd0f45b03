"""`DataConfig`: what is read, how it becomes tokens, and how tokens become batches."""

import dataclasses
from typing import Any

SOURCES = ("tasks", "stdlib", "files")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set for training and hold-out."""

    source: str = "tasks"  # tasks (generated) | stdlib (Python's own source files) | files
    files: tuple[dict[str, Any], ...] = ()  # dict(path=glob, weight=1.0, format="auto") each
    holdout_files: tuple[dict[str, Any], ...] = ()  # same form; empty = split off `files`
    tokenizer: str = "bytes"  # bytes | bpe (trained on the data) | tokenizer.json | *.model | folder
    bpe_vocab_size: int = 512  # entries of a trained BPE
    chat_template: str = ""  # folder or file of the template; "" = beside the tokenizer
    sequence_length: int = 128  # T, tokens per packed row
    batch_size: int = 16  # rows per optimizer step, all micro-batches together
    prompt_weight: float = 0.1  # loss weight of prompt tokens (answers weigh 1)
    seed: int = 0  # of shuffling and of the generated tasks
    holdout_seed: int = 1_000_003  # of the generated hold-out
