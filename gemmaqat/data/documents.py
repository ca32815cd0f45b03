"""`Document`: text in pieces, each with the loss weight of its tokens."""

import dataclasses
from typing import NamedTuple


class Piece(NamedTuple):
    """A stretch of text that is tokenized by itself, as a prompt and its answer are in use."""

    text: str
    weight: float  # loss weight of its tokens: 0 = context only


@dataclasses.dataclass(frozen=True)
class Document:
    """What attends to itself and to nothing else.

    Attributes:
        pieces: in reading order; their texts concatenated are the document.
        where: file and line (or record) it came from, for error messages.
        end: whether an end-of-text token follows (not after a stretch inside a file; chat templates
            write their own end of turn).
    """

    pieces: tuple[Piece, ...]
    where: str
    end: bool = True
