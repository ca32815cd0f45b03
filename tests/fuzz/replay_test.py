"""What fuzzing found is refused in a sentence ever after, and the fuzzer still finds."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_readers.py")
SPEC = importlib.util.spec_from_file_location("fuzz_readers", SCRIPT)
fuzz_readers = importlib.util.module_from_spec(SPEC)
sys.modules["fuzz_readers"] = fuzz_readers  # dataclasses look their module up
SPEC.loader.exec_module(fuzz_readers)

FOUND = sorted(fuzz_readers.CORPUS.rglob("*.json"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Makes the good folder of a target, once."""
    folders = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            fuzz_readers.TARGETS[name].make(folders[name])
            fuzz_readers.TARGETS[name].read(folders[name])
        return folders[name]

    return make


@pytest.mark.parametrize("path", FOUND, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_findings_stay_fixed(path, good):
    fuzz_readers.replay(path, good(path.parent.name))


@pytest.mark.parametrize("name", ["safetensors", "gguf"])
def test_a_short_search_under_a_memory_limit_finds_nothing(name):
    """In its own process: the limit of its address space stays there."""
    root = str(SCRIPT.parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, SCRIPT, name, "--rounds=60", "--seed=5"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 files" in done.stdout and "0 findings" in done.stdout


def raises(error):
    def read(folder):
        if (folder / "x").read_bytes() != b"good":
            raise error

    return read


@pytest.mark.parametrize(
    "error, wrong",
    [
        (KeyError("shape"), "KeyError"),
        (MemoryError(), "MemoryError"),
        (ValueError("no file named"), "unclear ValueError"),
        (ValueError("{folder}: two\nlines"), "unclear ValueError"),
        (ValueError("{folder}: x is damaged."), None),
    ],
    ids=str,
)
def test_only_one_clear_sentence_counts_as_refused(tmp_path, error, wrong):
    error.args = tuple(str(part).replace("{folder}", str(tmp_path)) for part in error.args)
    target = fuzz_readers.Target(lambda folder: None, raises(error), ())
    (tmp_path / "x").write_bytes(fuzz_readers.apply(b"good", [("set", 0, b"f".hex())]))
    if wrong is None:
        fuzz_readers.check(target, tmp_path)
        return
    with pytest.raises(fuzz_readers.Wrong, match=wrong):
        fuzz_readers.check(target, tmp_path)


def test_damage_is_what_the_edits_say():
    apply = fuzz_readers.apply
    assert apply(b"abcdef", [("set", 1, b"XY".hex())]) == b"aXYdef"
    assert apply(b"abcdef", [("insert", 1, b"XY".hex())]) == b"aXYbcdef"
    assert apply(b"abcdef", [("drop", 1, "2"), ("cut", 3, "")]) == b"ade"


def test_every_file_of_the_corpus_names_what_was_found():
    assert FOUND
    for path in FOUND:
        saved = json.loads(path.read_text())
        assert path.parent.name in fuzz_readers.TARGETS and saved["found"] and saved["edits"]
