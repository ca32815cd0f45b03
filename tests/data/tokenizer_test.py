"""Tokenizers: round trips, special tokens once and where they belong, errors that name the file."""

import dataclasses
import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gemmaqat.data.bpe import trained_bpe
from gemmaqat.data.config import DataConfig
from gemmaqat.data.documents import Document, Piece
from gemmaqat.data.loader import make_loader
from gemmaqat.data.packing import encode
from gemmaqat.data.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    make_tokenizer,
)

TEXT = "the cat sat on the mat; the dog sat on the log.\n"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint folder in the Hugging Face form, its tokenizer trained here."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<turn|>"}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }} {{ m.content }}<turn|>"
        "{% endfor %}{% if add_generation_prompt %}<|turn>model {% endif %}"
    )
    return folder


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A SentencePiece model with control pieces for turns."""
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=written, vocab_size=290,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=False, hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, control_symbols=["<|turn>", "<turn|>"],
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    path.write_bytes(written.getvalue())
    return path


def test_every_kind_keeps_text_and_satisfies_the_protocol(folder, model_file):
    for tokenizer in (ByteTokenizer(), load_tokenizer(folder), load_tokenizer(model_file)):
        assert isinstance(tokenizer, Tokenizer)
        ids = tokenizer.encode(TEXT)
        assert tokenizer.decode(ids) == TEXT
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids


def test_bytes_of_other_scripts_need_256_entries():
    with pytest.raises(ValueError, match="a.txt: byte 195 at offset 3 .*'bytes-256'"):
        ByteTokenizer().encode("café", where="a.txt")
    wide = make_tokenizer(DataConfig(tokenizer="bytes-256"))
    assert wide.decode(wide.encode("café")) == "café"
    with pytest.raises(ValueError, match="byte 1 at offset 1"):
        wide.encode("a\x01")  # would be read as the end of text


def test_special_tokens_come_from_the_tokenizer_config(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_id, tokenizer.bos_id) == (0, 2)
    assert tokenizer.eos_id == SPECIAL.index("<turn|>")
    alone = FileTokenizer(folder / "tokenizer.json")
    assert alone.eos_id == SPECIAL.index("<eos>")


def test_control_pieces_in_text_are_recognised(folder, model_file):
    for place in (folder, model_file):
        tokenizer = load_tokenizer(place)
        ids = tokenizer.encode("<|turn>the cat<turn|>")
        assert tokenizer.decode(ids) == "the cat"
        assert len(ids) == 2 + len(tokenizer.encode("the cat"))


def test_the_beginning_of_text_stands_exactly_once(folder):
    tokenizer = load_tokenizer(folder)
    for text in ("<bos>the cat", "the cat"):
        encoded = encode(Document((Piece(text, 1.0),), "here"), tokenizer)
        assert encoded["tokens"].tolist().count(tokenizer.bos_id) == 1
        assert encoded["tokens"][0] == tokenizer.bos_id
        assert tokenizer.bos_id not in encoded["targets"]


def _piece_model(path, **options):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "Question: where? Answer: on the mat.\n"] * 20),
        model_writer=written, vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        control_symbols=["<|turn>", "<turn|>"], minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(written.getvalue())
    return load_tokenizer(path)


def _json_tokenizer(path, pre_tokenizer, normalizer=None, decoder=None):
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder or decoders.Metaspace()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([TEXT, "Question: where? Answer: on the mat."], trainer)
    tokenizer.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def prefixing(tmp_path_factory):
    """Tokenizers that put a space before a beginning, each in its own way."""
    folder = tmp_path_factory.mktemp("prefixing")
    space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    split = pre_tokenizers.Split("▁", "merged_with_next")
    metaspace = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always")])
    return {
        "sentencepiece": _piece_model(folder / "a.model"),  # removes extra spaces, too
        "sentencepiece, spaces kept": _piece_model(
            folder / "b.model", remove_extra_whitespaces=False, normalization_rule_name="identity"
        ),
        "metaspace": _json_tokenizer(folder / "c.json", metaspace),
        "first": _json_tokenizer(folder / "d.json", pre_tokenizers.Metaspace()),
        "prepend": _json_tokenizer(folder / "e.json", split, space),
        "bytes": _json_tokenizer(
            folder / "f.json", pre_tokenizers.ByteLevel(), decoder=decoders.ByteLevel()
        ),
    }


PREFIXING = [
    "sentencepiece",
    "sentencepiece, spaces kept",
    "metaspace",
    "first",
    "prepend",
    "bytes",
]


@pytest.mark.parametrize("name", PREFIXING)
@pytest.mark.parametrize(
    ("prompt", "response"),
    [("where?", " on the mat."), ("where? (", "the cat)"), ("the cat:\n", "the log"), ("a:", "b")],
)
def test_a_response_has_the_tokens_it_has_in_the_joined_text(prefixing, name, prompt, response):
    tokenizer = prefixing[name]
    document = Document((Piece(prompt, 0.0), Piece(response, 1.0)), "here", end=False)
    encoded = encode(document, tokenizer)
    assert encoded["targets"].tolist() == tokenizer.encode(prompt + response)
    learned = encoded["targets"][encoded["loss_weights"] > 0].tolist()
    assert tokenizer.encode(prompt) + learned == encoded["targets"].tolist()


@pytest.mark.parametrize("name", PREFIXING)
def test_a_response_inside_a_word_gets_no_space(prefixing, name):
    tokenizer = prefixing[name]
    ids = tokenizer.encode("the c") + tokenizer.encode("at", after="the c")
    assert tokenizer.decode(ids).strip() == "the cat"


def test_saved_truncation_and_padding_are_not_obeyed(folder, tmp_path):
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=64)
    saved.save(str(tmp_path / "tokenizer.json"))
    expected = load_tokenizer(folder).encode(TEXT)
    assert 4 < len(expected) < 64
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(TEXT) == expected


def test_special_tokens_are_part_of_the_fingerprint(folder):
    alone = FileTokenizer(folder / "tokenizer.json")
    assert alone.fingerprint != load_tokenizer(folder).fingerprint


def test_a_chat_goes_through_template_and_tokenizer(folder, tmp_path):
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps({"messages": messages, "id": i}) + "\n" for i in range(9)))
    config = DataConfig(source="files", files=(dict(path=str(data)),), tokenizer=str(folder),
                        sequence_length=32, batch_size=1)  # fmt: skip
    loader = make_loader(config, seed=0)
    batch = next(loader)
    first = batch["segment_ids"] == 1
    learned = batch["targets"][first & (batch["loss_weights"] > 0)]
    expected = loader.tokenizer.encode("assistant sat<turn|>")
    assert learned.tolist() in (expected, loader.tokenizer.encode("sat<turn|>"))
    assert set(batch["loss_weights"][first].tolist()) == {0.0, 1.0}


def test_a_bpe_is_trained_once_and_its_ids_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMAQAT_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "a.txt"
    data.write_text("".join(f"{i}: {TEXT}" for i in range(400)))
    config = DataConfig(source="files", files=(dict(path=str(data)),), tokenizer="bpe",
                        bpe_vocab_size=300)  # fmt: skip
    tokenizer = make_tokenizer(config)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode("the cat é")) == "the cat é"
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    path = trained_bpe(config)
    written = path.stat().st_mtime_ns, path.read_bytes()
    assert make_tokenizer(config).fingerprint == tokenizer.fingerprint
    assert path.stat().st_mtime_ns == written[0]
    path.unlink()
    assert trained_bpe(config).read_bytes() == written[1]  # training again gives the same
    assert trained_bpe(dataclasses.replace(config, bpe_vocab_size=310)) != path


def test_a_bpe_smaller_than_its_alphabet_is_refused():
    with pytest.raises(ValueError, match="bpe_vocab_size: 200 is below 259"):
        make_tokenizer(DataConfig(tokenizer="bpe", bpe_vocab_size=200))


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.json", None, FileNotFoundError, "no such tokenizer file"),
        ("", None, FileNotFoundError, "holds neither tokenizer.json nor tokenizer.model"),
        ("tokenizer.json", b"{}", ValueError, "not a tokenizer.json of the tokenizers library"),
        ("tokenizer.json", b"\xff\x00", ValueError, "not a tokenizer.json"),
        ("tokenizer.model", b"nonsense", ValueError, "not a SentencePiece model"),
    ],
)
def test_a_bad_tokenizer_is_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        load_tokenizer(tmp_path / name if name else tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_vocabulary_beyond_the_models_is_refused(folder):
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    expected = "ids up to .* the model's vocabulary ends at 127; set data.tokenizer"
    with pytest.raises(ValueError, match=expected) as caught:
        check_vocabulary(tokenizer, 128)
    assert "vocab_size" not in str(caught.value)  # no field of the config
