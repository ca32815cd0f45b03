"""`gemmaqat export` and `verify`: from a run to a file that is proved, and no half of one."""

import dataclasses
import json
import re
import resource
from pathlib import Path

import pytest

from gemmaqat.interop.options import ExportOptions
from gemmaqat.main import main

GOLDEN = Path(__file__).parent / "golden" / "gemma4"

# ml_collections loads config files by a method that Python means to remove.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

EXPERIMENT = """
from gemmaqat.config import base

def get_config():
    config = base("31b_mini")
    config.quantization.recipe = "q4_0"
    return config
"""


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setenv("GEMMAQAT_COMPILATION_CACHE", "off")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("experiments") / "small.py"
    path.write_text(EXPERIMENT)
    return f"--config={path}"


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    """A work directory of two training steps, judged."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    for verb in ("train", "evaluate"):
        arguments = [verb, config, "--tiny", f"--workdir={workdir}", "--compilation_cache=off"]
        assert main(["gemmaqat", *arguments]) == 0
    return workdir


@pytest.fixture(scope="module")
def shipped(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shipped") / "gguf"
    arguments = [f"--checkpoint={run}", "--format=gguf", f"--workdir={folder}"]
    assert main(["gemmaqat", "export", *arguments, "--compilation_cache=off"]) == 0
    return folder


def mistake(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["gemmaqat", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("gemmaqat: error:")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]


def test_a_run_is_shipped_with_the_evaluation_of_its_codes(run, shipped):
    certificate = json.loads((shipped / "certificate.json").read_text())
    assert certificate["exact_share"] == 1 and certificate["recipe"] == "q4_0"
    about = certificate["provenance"]
    judged = json.loads((run / "evaluation" / "q4_0" / "metrics.json").read_text())
    assert about["evaluation"]["metrics"] == judged["metrics"]
    assert about["evaluation"]["contents_sha256"] == certificate["contents_sha256"]
    assert about["step"] == 2 and len(about["data_sha256"]) == 64


def test_a_shipped_file_verifies_and_is_judged_by_its_codes(shipped, run, config, capsys, tmp_path):
    assert main(["gemmaqat", "verify", f"--checkpoint={shipped}"]) == 0
    assert re.search(r"intact: \d+ tensors agree with its certificate", capsys.readouterr().out)
    arguments = [config, "--tiny", f"--checkpoint={shipped}", f"--workdir={tmp_path}"]
    assert main(["gemmaqat", "evaluate", *arguments]) == 0
    again = json.loads((tmp_path / "evaluation" / "q4_0" / "metrics.json").read_text())
    before = json.loads((run / "evaluation" / "q4_0" / "metrics.json").read_text())
    assert again["contents_sha256"] == before["contents_sha256"]
    assert again["metrics"]["all_perplexity"] == before["metrics"]["all_perplexity"]


def test_a_disk_that_fills_leaves_nothing_under_the_name(run, capsys, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        arguments = ["--format=gguf", f"--workdir={tmp_path / 'out'}"]
        message = mistake(capsys, "export", f"--checkpoint={run}", *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message
    assert list(tmp_path.iterdir()) == []


def test_every_choice_of_an_export_is_a_flag_of_one_line(capsys):
    assert main(["gemmaqat", "export", "--help"]) == 0
    page = capsys.readouterr().out
    for field in dataclasses.fields(ExportOptions):
        assert re.search(rf"^  --{field.name} +\S.*\.$", page, re.MULTILINE), field.name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["export", "--format=gguf", "--workdir=x"], "--checkpoint: missing"),
        (["export", f"--checkpoint={GOLDEN / '31b'}", "--workdir=x"], "--format: missing"),
        (
            ["export", f"--checkpoint={GOLDEN / '31b'}", "--format=gguf", "--workdir=x"],
            "--config: missing",
        ),
        (
            ["export", "CONFIG", f"--checkpoint={GOLDEN / '31b'}", "--format=ggfu", "--workdir=x"],
            "did you mean 'gguf'",
        ),
        (
            [
                "export", "CONFIG", "--config.quantization.recipe=int8", "--format=litert",
                f"--checkpoint={GOLDEN / '31b'}", "--workdir=x",
                "--prefill_lengths=64", "--prefill_lengths=16", "--cache_length=32",
            ],
            "prefill_lengths (64, 16) must be one or more numbers between 1 and cache_length (32)",
        ),
        (
            [
                "export", "CONFIG", f"--checkpoint={GOLDEN / '31b'}", "--format=gguf",
                "--stacked_layers", "--workdir=x",
            ],
            "stacked_layers=True: 'gguf' has no such option",
        ),
        (
            [
                "export", "CONFIG", f"--checkpoint={GOLDEN / '31b'}", "--format=gguf",
                "--workdir=.",
            ],
            ".: is the current directory; name a new folder",
        ),
        (["verify", "--checkpoint=no/file"], "no/file: no such file or folder"),
        (["verify", f"--checkpoint={GOLDEN / '31b'}"], "nothing to compare it with"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence(capsys, config, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [config if a == "CONFIG" else a for a in arguments]
    assert message in mistake(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


GGUF_OF_HALVES = """
from gemmaqat.config import base

def get_config():
    config = base("31b_mini")
    config.quantization.recipe = "none"
    config.export.format = "gguf"
    config.export.options = dict(tables="f16")
    return config
"""


def test_options_of_the_config_are_those_of_its_format(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(GGUF_OF_HALVES)
    source = [f"--config={file}", f"--checkpoint={GOLDEN / '31b'}", "--text_only"]
    for format, chosen in ("hf", {"text_only"}), ("gguf", {"text_only", "tables"}):
        out = tmp_path / format
        arguments = [*source, f"--format={format}", f"--workdir={out}"]
        assert main(["gemmaqat", "export", *arguments]) == 0
        assert json.loads((out / "certificate.json").read_text())["options"].keys() == chosen
