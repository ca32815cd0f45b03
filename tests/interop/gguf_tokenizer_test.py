"""Tokenizers to metadata and back, judged by the `tokenizers` library."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers

from gemmaqat.interop.gguf_file import GgufFile
from gemmaqat.interop.gguf_tokenizer import ExtractedFiles, TokenType, tokenizer_metadata
from gemmaqat.models.sizes import model_config

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>"]
TEXT = ["the quick brown fox", "jumps over  the lazy dog\n\n\tand again", "def f(x):\n    return x"]


def train(folder: Path, vocab_size: int = 400) -> Path:
    """A byte-pair tokenizer of Gemma's kind."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("\n+"), behavior="isolated"
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][: len(SPECIAL)]  # bytes are no text
    definition["pre_tokenizer"] = None
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(definition))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer"))


def config(vocab_size: int = 400):
    return model_config("e2b_mini", vocab_size=vocab_size, stop_ids=(1, 6))


def write(path: Path, metadata: dict) -> GgufFile:
    writer = gguf.GGUFWriter(path, "gemma4")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.add_tensor("x", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def test_tokens_types_merges_and_special_ids_are_the_tokenizers(tokenizer):
    metadata = tokenizer_metadata({"tokenizer.json": tokenizer}, config())
    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    size = library.get_vocab_size()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert tokens[:size] == [library.id_to_token(i) for i in range(size)]
    assert types[:8] == [TokenType.CONTROL] * 7 + [TokenType.USER_DEFINED]
    assert set(types[8:264]) == {TokenType.BYTE}
    assert metadata["tokenizer.ggml.bos_token_id"] == 2
    assert metadata["tokenizer.ggml.eos_token_id"] == 1
    assert metadata["tokenizer.ggml.eot_token_id"] == 6
    assert metadata["tokenizer.ggml.unknown_token_id"] == 3
    assert metadata["tokenizer.ggml.mask_token_id"] == 4
    merges = json.loads(tokenizer.read_text())["model"]["merges"]
    assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_rows_beyond_the_tokenizer_get_unused_tokens(tokenizer):
    metadata = tokenizer_metadata({"tokenizer.json": tokenizer}, config(500))
    assert len(metadata["tokenizer.ggml.tokens"]) == 500
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD499]"
    assert metadata["tokenizer.ggml.token_type"][-1] == TokenType.UNUSED


def test_a_tokenizer_of_more_tokens_than_rows_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the model's table has 300 rows"):
        tokenizer_metadata({"tokenizer.json": tokenizer}, config(300))


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ValueError, match="'Unigram', expected 'BPE'"):
        tokenizer_metadata({"tokenizer.json": path}, config())
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        tokenizer_metadata({"tokenizer.json": path}, config())
    with pytest.raises(ValueError, match="needs the merges of a tokenizer.json"):
        tokenizer_metadata({"tokenizer.model": path}, config())


def test_chat_template_and_suppressed_tokens_come_along(tokenizer, tmp_path):
    files = {"tokenizer.json": tokenizer}
    for name, content in (
        ("generation_config.json", json.dumps({"suppress_tokens": [5, 7]})),
        ("tokenizer_config.json", json.dumps({"chat_template": "from the configuration"})),
        ("chat_template.jinja", "{{ messages }}"),
    ):
        (tmp_path / name).write_text(content)
        files[name] = tmp_path / name
    metadata = tokenizer_metadata(files, config())
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["tokenizer.ggml.suppress_tokens"] == [5, 7]
    del files["chat_template.jinja"]
    assert tokenizer_metadata(files, config())["tokenizer.chat_template"].startswith("from")
    back = ExtractedFiles(write(tmp_path / "x.gguf", metadata))
    assert back["chat_template.jinja"].read_text() == "{{ messages }}"
    assert json.loads(back["generation_config.json"].read_text())["suppress_tokens"] == [5, 7]


def test_a_tokenizer_read_back_gives_the_same_ids(tokenizer, tmp_path):
    metadata = tokenizer_metadata({"tokenizer.json": tokenizer}, config(500))
    files = ExtractedFiles(write(tmp_path / "x.gguf", metadata))
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    again = tokenizers.Tokenizer.from_file(str(files["tokenizer.json"]))
    original = tokenizers.Tokenizer.from_file(str(tokenizer))
    assert again.get_vocab() == original.get_vocab()
    for text in [*TEXT, "<bos><|turn>user\nhé 日本 \U0001f600<turn|>", "  x  <|channel>thought"]:
        assert again.encode(text).ids == original.encode(text).ids
    for text in TEXT:
        assert again.decode(again.encode(text).ids) == text
    settings = json.loads(files["tokenizer_config.json"].read_text())
    assert (settings["bos_token"], settings["unk_token"]) == ("<bos>", "<unk>")
    folder = files["tokenizer.json"].parent
    del files
    assert not folder.exists()


def test_a_synthetic_vocabulary_is_marked_and_not_given_back(tmp_path):
    metadata = tokenizer_metadata({}, config(300))
    assert metadata["gemmaqat.synthetic_vocabulary"] is True
    tokens = metadata["tokenizer.ggml.tokens"]
    assert (tokens[2], tokens[65], tokens[32]) == ("<bos>", "A", "\u2581")
    assert (tokens[200], tokens[299]) == ("<0xC8>", "[PAD299]")
    assert len(set(tokens)) == 300
    assert "tokenizer.ggml.eot_token_id" not in metadata  # 6 is a character here
    assert dict(ExtractedFiles(write(tmp_path / "x.gguf", metadata))) == {}


def test_merges_that_make_no_token_are_refused(tmp_path, tokenizer):
    metadata = tokenizer_metadata({"tokenizer.json": tokenizer}, config())
    metadata["tokenizer.ggml.merges"] = ["zzz yyy"]
    files = ExtractedFiles(write(tmp_path / "x.gguf", metadata))
    with pytest.raises(ValueError, match="a merge of the tokenizer makes no token"):
        files["tokenizer.json"]
