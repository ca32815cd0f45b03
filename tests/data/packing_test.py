"""Packing: nothing lost, nothing crossed, positions and weights where they belong."""

import grain
import numpy as np
import pytest

from gemmaqat.data.documents import Document, Piece
from gemmaqat.data.packing import SERIAL, SplitDocuments, encode, pack, pack_all, to_batches
from gemmaqat.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def _document(text: str, *, end: bool = True) -> Document:
    return Document((Piece(text, 1.0),), "here", end=end)


def test_targets_are_the_next_tokens_and_prompts_weigh_less():
    document = Document((Piece("ab", 0.25), Piece("cd", 1.0)), "here")
    encoded = encode(document, TOKENIZER)
    assert encoded["tokens"].tolist() == [BOS, *b"abcd"]
    assert encoded["targets"].tolist() == [*b"abcd", EOS]
    assert encoded["loss_weights"].tolist() == [0.25, 0.25, 1, 1, 1]


def test_a_document_without_an_end_does_not_learn_one():
    assert encode(_document("ab", end=False), TOKENIZER)["targets"].tolist() == [*b"ab"]
    assert len(encode(_document("", end=False), TOKENIZER)) == 0


def test_long_documents_are_split_into_parts_that_start_anew():
    parts = SplitDocuments(TOKENIZER, 4).flat_map([_document("abcdefghij")])
    assert [p["targets"].tobytes() for p in parts] == [
        np.asarray(ids, "i4").tobytes() for ids in ([*b"abcd"], [*b"efgh"], [*b"ij", EOS])
    ]
    assert all(part["tokens"][0] == BOS for part in parts)
    assert parts[1]["tokens"].tolist() == [BOS, *b"efg"]


def test_parts_with_nothing_to_learn_are_left_out():
    document = Document((Piece("abcdefgh", 0.0), Piece("ij", 1.0)), "here")
    parts = SplitDocuments(TOKENIZER, 4).flat_map([document])
    assert len(parts) == 1 and parts[0]["targets"].tolist() == [*b"ij", EOS]


@pytest.mark.parametrize("seed", [None, 3], ids=["in order", "shuffled"])
def test_every_token_is_packed_once_and_segments_are_whole(seed):
    rng = np.random.default_rng(0)
    texts = [
        "".join(rng.choice(list("abcdefghijklmnop"), size=rng.integers(1, 60))) for _ in range(300)
    ]
    parts = SplitDocuments(TOKENIZER, 32).flat_map([_document(text) for text in texts])
    source = grain.MapDataset.source(parts).to_iter_dataset(SERIAL)
    found = []
    for row in pack(source, 32, seed=seed):
        ids = row["segment_ids"]
        assert row["tokens"].shape == row["positions"].shape == (32,)
        assert (np.diff(ids[ids > 0]) >= 0).all()
        assert (row["positions"][ids == 0] == -1).all()
        assert (row["loss_weights"][ids == 0] == 0).all()
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            assert row["positions"][here].tolist() == list(range(here.sum()))
            assert row["tokens"][here][0] == BOS
            found.append(row["targets"][here].tobytes())
    assert sorted(found) == sorted(part["targets"].tobytes() for part in parts)


def test_the_last_batch_is_filled_with_empty_rows():
    parts = SplitDocuments(TOKENIZER, 8).flat_map([_document("abcdefg")] * 3)
    batches = pack_all(parts, 8, batch_size=2, padding={})
    assert len(batches) == 2
    assert batches[1]["segment_ids"].tolist() == [[1] * 8, [0] * 8]
    assert batches[1]["positions"][1].tolist() == [-1] * 8
    assert not batches[1]["loss_weights"][1].any()
    assert to_batches([], 4) == [] == pack_all([], 8, 2, padding={})
