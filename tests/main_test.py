"""The command line: each verb once on a tiny model, and each mistake in one sentence."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gemmaqat import main as main_module
from gemmaqat.main import main
from gemmaqat.training.loop import Terminated

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "gemma4"

# ml_collections loads config files by a method that Python means to remove.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

EXPERIMENT = """
from gemmaqat.config import base

def get_config(size: str = "31b_mini"):
    config = base(size)
    config.quantization.recipe = "int4_channel"
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("experiments") / "small.py"
    path.write_text(EXPERIMENT)
    return f"--config={path}"


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    """A work directory of two training steps."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["train", config, "--tiny", f"--workdir={workdir}", "--compilation_cache=off"]
    assert main(["gemmaqat", *arguments]) == 0
    return workdir


def command(capsys, *arguments: str) -> str:
    """Standard output of a command that succeeds."""
    capsys.readouterr()
    status = main(["gemmaqat", *map(str, arguments)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def mistake(capsys, *arguments: str) -> str:
    """The one sentence of a command that fails."""
    capsys.readouterr()
    assert main(["gemmaqat", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gemmaqat: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]], ids=str)
def test_help_shows_verbs_and_examples(capsys, arguments):
    page = command(capsys, *arguments)
    for verb in ("train", "compare", "evaluate", "quantize", "generate", "inspect", "doctor"):
        assert re.search(rf"^  {verb} ", page, re.MULTILINE)
    assert "gemmaqat compare --config=" in page


def test_verb_help_lists_its_flags_only(capsys):
    page = command(capsys, "generate", "--help")
    assert "--prompt" in page and "--temperature" in page and "--dry_run" not in page


def test_doctor_says_versions_devices_kernels_memory_and_cache(capsys):
    page = command(capsys, "doctor")
    for word in ("python 3", "jax ", "device 0: cpu", "free memory", "kernels: ", "cache: "):
        assert word in page


def test_the_compilation_cache_follows_flag_and_variable(capsys, tmp_path, monkeypatch):
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert "cache: off" in command(capsys, "doctor", "--compilation_cache=off")
        assert f"cache: {tmp_path}" in command(capsys, "doctor", f"--compilation_cache={tmp_path}")
        monkeypatch.delenv("GEMMAQAT_COMPILATION_CACHE")
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert f"cache: {tmp_path}/xdg/gemmaqat/jax" in command(capsys, "doctor")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_inspect_shows_every_parameter_of_a_full_size_without_allocating(capsys, config):
    page = command(capsys, "inspect", f"{config}:26b_a4b")
    assert "layers/*/experts/gate_up_proj/weight" in page
    assert "25,233,141,790 parameters" in page
    assert re.search(r"experts 100\.0%, router 0\.0%", page)
    assert "bits per parameter" in page


def test_plan_and_dry_runs_start_nothing(capsys, config, tmp_path):
    workdir = tmp_path / "nothing"
    page = command(capsys, "plan", f"{config}:31b", "--config.data.batch_size=1")
    assert "30,697,345,340 in float32" in page and "does NOT fit" in page
    page = command(capsys, "train", config, f"--workdir={workdir}", "--dry_run")
    assert "recipe int4_channel" in page and "optimizer state" in page
    page = command(capsys, "compare", config, f"--workdir={workdir}", "--dry_run")
    assert "31b_mini, int2_channel: " in page and "teacher" in page
    assert "base_steps" in mistake(capsys, "compare", f"{config}:31b", "--dry_run")
    assert not workdir.exists()


def test_train_quantize_evaluate_generate_go_together(capsys, run, tmp_path):
    packed = tmp_path / "packed"
    page = command(capsys, "quantize", f"--checkpoint={run}", f"--workdir={packed}")
    assert "recipe int4_channel" in page and f"wrote {packed}" in page
    settings = ["--prompt=copy abc", "--max_new_tokens=8"]
    assert command(capsys, "generate", f"--checkpoint={packed}", *settings).endswith("\n")
    page = command(capsys, "generate", f"--checkpoint={run}", *settings, "--prompt=sort")
    assert page.startswith("--- copy abc\n")
    page = command(capsys, "evaluate", f"--workdir={run}")
    assert re.search(r"float +int4_channel", page) and "answer_perplexity" in page

    files = [path for path in packed.rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in files]
    message = mistake(capsys, "quantize", f"--checkpoint={run}", f"--workdir={packed}")
    assert "not empty" in message
    assert [path.read_bytes() for path in files] == before


def test_a_hugging_face_folder_is_quantized_and_keeps_its_companions(capsys, config, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "12b", tmp_path / "12b"))
    (folder / "tokenizer.json").write_text("{}")
    packed = tmp_path / "packed"
    command(capsys, "quantize", config, f"--checkpoint={folder}", f"--workdir={packed}")
    assert {"tokenizer.json", "generation_config.json", "packed.safetensors"} <= {
        path.name for path in packed.iterdir()
    }


def test_a_comparison_is_no_checkpoint_but_names_one(capsys, run):
    (run.parent / "run.json").write_text("{}")
    message = mistake(capsys, "generate", f"--checkpoint={run.parent}", "--prompt=x")
    assert f"name one of its runs, such as {run}." in message


def test_a_run_is_quantized_by_its_own_table_only(capsys, config, run, tmp_path):
    message = mistake(
        capsys, "quantize", config, "--config.quantization.recipe=int8", f"--checkpoint={run}",
        f"--workdir={tmp_path / 'packed'}",
    )  # fmt: skip
    assert "trained for another quantization table" in message and "layers/" in message


def test_a_work_directory_of_another_config_is_refused_untouched(capsys, config, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    message = mistake(
        capsys, "train", config, "--tiny", "--config.optimizer.learning_rate=0.5",
        f"--workdir={run}",
    )  # fmt: skip
    assert str(run) in message and "optimizer.learning_rate" in message
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], r"'trian' is not one of .*; did you mean 'train'\?"),
        (["train"], r"--config: missing"),
        (["train", "--workdri=x"], r"Unknown command line flag 'workdri'. Did you mean: workdir"),
        (["train", "--prompt=x"], r"Unknown command line flag 'prompt'"),
        (["train", "CONFIG", "stray"], r"'stray': not a flag"),
        (["train", "CONFIG"], r"--workdir: missing"),
        (["train", "--config=no/such.py"], r"--config=no/such\.py: no such file"),
        (["train", "--config.train.num_steps=1", "CONFIG"], r"before a value for --config"),
        (["train", "--config.train.num_steps=1"], r"give --config=FILE before it"),
        (
            ["train", "CONFIG", "--config.train.num_step=1"],
            r"--config\.train\.num_step: no such field 'num_step'; did you mean 'num_steps'\?",
        ),
        (
            ["train", "CONFIG", "--config.trian.num_steps=1"],
            r"--config\.trian\.num_steps: no such field 'trian'; did you mean 'train'\?",
        ),
        (["train", "CONFIG", "--config.train.num_steps=many"], r"num_steps=many: invalid literal"),
        (["train", "CONFIG:e2b_minni"], r"config\.model\.name: 'e2b_minni' .*mean 'e2b_mini'"),
        (
            ["inspect", "CONFIG", "--config.quantization.recipe=int4_chanel"],
            r"recipe 'int4_chanel' is unknown; did you mean 'int4_channel'\?",
        ),
        (
            ["inspect", "CONFIG", "--config.quantization.rules=({'weigth_qtype': 'int8'},)"],
            r"quantization\.rules\[0\].*'weigth_qtype'; did you mean 'weight_qtype'\?",
        ),
        (
            [
                "inspect", "CONFIG",
                "--config.quantization.rules=({'module_path': 'layers/9/.*'},)",
            ],
            r"module_path='layers/9/\.\*' matches nothing; nearest paths: layers/",
        ),
        (["generate"], r"--checkpoint: missing"),
        (["generate", "--checkpoint=no/folder", "--prompt=x"], r"no/folder: no such folder"),
        (["generate", f"--checkpoint={GOLDEN / '12b'}"], r"--prompt: missing"),
        (
            ["generate", f"--checkpoint={GOLDEN / '12b'}", "--prompt=x"],
            r"holds neither tokenizer\.json nor tokenizer\.model",
        ),
        (["generate", "--dtype=float8", "--checkpoint=x"], r"float8.*float32"),
        (["quantize", "CONFIG", "--workdir=x"], r"--checkpoint: missing"),
        (["evaluate", "CONFIG", "--tiny", "--workdir=no/run"], r"no trained model there"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence(capsys, config, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [config + a.removeprefix("CONFIG") if "CONFIG" in a else a for a in arguments]
    assert re.search(message, mistake(capsys, *arguments))
    assert not list(tmp_path.iterdir())


def test_a_mistake_inside_a_config_file_is_one_sentence(capsys, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    raise ValueError('x is y')")
    assert "x is y" in mistake(capsys, "inspect", f"--config={path}")
    path.write_text(EXPERIMENT.replace("quantization.recipe", "quantization.recip"))
    assert "did you mean 'recipe'?" in mistake(capsys, "inspect", f"--config={path}")


@pytest.mark.parametrize("damage", ["missing", "truncated", "shape", "family"])
def test_a_damaged_checkpoint_is_one_sentence(capsys, config, tmp_path, damage):
    folder = Path(shutil.copytree(GOLDEN / "12b", tmp_path / "12b"))
    weights = folder / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "shape":
        save_file({"model.embed_tokens.weight": np.zeros((2, 2), np.float32)}, weights)
    else:
        (folder / "config.json").write_text('{"model_type": "llama"}')
    message = mistake(
        capsys, "quantize", config, f"--checkpoint={folder}", f"--workdir={tmp_path / 'out'}"
    )
    assert str(folder) in message
    assert not (tmp_path / "out").exists()


def test_out_of_vocabulary_prompts_are_one_sentence(capsys, run):
    message = mistake(capsys, "generate", f"--checkpoint={run}", "--prompt=é")
    assert "vocabulary" in message
    message = mistake(
        capsys, "generate", f"--checkpoint={run}", "--prompt=e", "--max_new_tokens=99999"
    )
    assert "max_position" in message


@pytest.fixture
def doctor_that(monkeypatch):
    """Puts another function in the place of the verb `doctor`."""

    def replace(function):
        verb = main_module._VERBS["doctor"]._replace(run=function)
        monkeypatch.setitem(main_module._VERBS, "doctor", verb)

    return replace


@pytest.mark.parametrize(
    "error, message",
    [
        (PermissionError(13, "Permission denied", "/runs/a"), "/runs/a: Permission denied; choose"),
        (IsADirectoryError(21, "Is a directory", "/runs/a"), "/runs/a: Is a directory; choose"),
        (OSError(28, "No space left on device"), "output: No space left on device; choose"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_system_refuses_is_one_sentence(capsys, doctor_that, error, message):
    def fail(options):
        raise error

    doctor_that(fail)
    assert message in mistake(capsys, "doctor")


def test_a_work_directory_below_a_file_is_one_sentence(capsys, config, tmp_path):
    (tmp_path / "file").touch()
    arguments = ["compare", config, "--tiny", f"--workdir={tmp_path / 'file' / 'run'}"]
    assert re.search(r"file/run: Not a directory; choose another", mistake(capsys, *arguments))


def test_an_error_from_elsewhere_says_how_to_find_it(capsys, doctor_that):
    doctor_that(lambda options: json.loads("{"))
    assert "(run with --debug to see where)" in mistake(capsys, "doctor")
    assert "--debug" not in mistake(capsys, "trian")


def test_a_stopped_run_says_a_command_that_goes_on(capsys, doctor_that, monkeypatch):
    monkeypatch.setattr(main_module, "_set_up_compilation_cache", lambda choice: None)

    def stop(options):
        raise Terminated(143)

    doctor_that(stop)
    assert main(["/somewhere/__main__.py", "doctor", "--compilation_cache=a b"]) == 143
    line = capsys.readouterr().err
    assert shlex.split(line.partition("to go on: ")[2]) == [
        sys.executable, "-m", "gemmaqat", "doctor", "--compilation_cache=a b",
    ]  # fmt: skip


def test_debug_shows_the_traceback(config):
    with pytest.raises(ValueError, match="is unknown"):
        main(["gemmaqat", "inspect", config, "--config.quantization.recipe=x", "--debug"])


def test_the_module_is_the_command():
    """One process: the entry point, the exit status, and standard error."""
    result = subprocess.run(
        [sys.executable, "-m", "gemmaqat", "inspct"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 2
    assert "did you mean 'inspect'?" in result.stderr and "Traceback" not in result.stderr


def test_saved_config_of_a_run_is_enough_to_inspect_it(run):
    assert json.loads((run / "config.json").read_text())["model"]["name"] == "31b_mini"
