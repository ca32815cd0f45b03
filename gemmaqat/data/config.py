"""`DataConfig`: what is read, how it becomes tokens, and how tokens become batches."""

import dataclasses
from typing import Any

SOURCES = ("tasks", "stdlib", "files")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set for training and hold-out.

    An entry of `files` is a dict with these keys:

        path: a file or a glob (`**` descends); or `source`: "tasks" or "stdlib", to mix those in.
        weight: share of the packed rows, relative to the other entries; default 1.
        format: auto (by suffix) | text | jsonl | parquet | arrayrecord.
        text_field: the field that holds the text of a record; default "text".

    A record is `text`, or `prompt` and `response`, or chat `messages`, with `tools` if it has them.
    """

    source: str = "tasks"  # tasks (generated) | stdlib (Python's own source files) | files
    files: tuple[dict[str, Any], ...] = ()  # the mixture, when source is files
    holdout_files: tuple[dict[str, Any], ...] = ()  # same form; empty = split off `files`
    tokenizer: str = "bytes"  # bytes (ASCII) | bytes-256 | bpe (trained) | file or folder
    bpe_vocab_size: int = 512  # entries of a trained BPE
    chat_template: str = ""  # folder or file of the template; "" = beside the tokenizer
    sequence_length: int = 128  # T, tokens per packed row
    batch_size: int = 16  # rows per optimizer step, all micro-batches together
    prompt_weight: float = 0.1  # loss weight of prompts (answers weigh 1; in chats prompts weigh 0)
    seed: int = 0  # of shuffling and of the generated tasks
    holdout_seed: int = 1_000_003  # of the generated hold-out and of the order of any hold-out
