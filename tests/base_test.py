"""A multimodal checkpoint keeps all its tensors and files through training, packing and export."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemmaqat.interop.load import read_shipment
from gemmaqat.main import main

GOLDEN = Path(__file__).parent / "golden" / "gemma4"
TOWERS = {
    "model.vision_tower.patch.weight": np.arange(24, dtype=np.float16).reshape(4, 6),
    "model.audio_tower.layers.0.weight": np.arange(10, dtype=np.int64),
    "model.embed_vision.embedding_projection.weight": np.ones((8, 4), np.float32),
}

# ml_collections loads config files by a method that Python means to remove.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def command(*arguments: object) -> None:
    assert main(["gemmaqat", *map(str, arguments), "--compilation_cache=off"]) == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "gemma"
    shutil.copytree(GOLDEN / "e2b", folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors |= TOWERS | {"lm_head.weight": tensors[name].copy()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = {"hidden_size": 4, "note": "as released"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text('{"size": 4}')
    return folder


@pytest.fixture(scope="module")
def config(checkpoint, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("experiments") / "small.py"
    path.write_text(
        "from gemmaqat.config import base\n\n"
        "def get_config():\n"
        "    config = base('e2b_mini')\n"
        "    config.quantization.recipe = 'int4_channel'\n"
        f"    config.model.checkpoint = {str(checkpoint)!r}\n"
        "    config.data.update(sequence_length=32, batch_size=2)\n"
        "    config.train.update(num_steps=2, eval_sequences=0, log_every=1)\n"
        "    config.optimizer.warmup_steps = 1\n"
        # of 16 columns, fewer than a block of a GGUF
        "    keep = dict(module_path=r'.*/per_layer_projection', weight_qtype=None)\n"
        "    config.quantization.rules = (keep,)\n"
        "    return config\n"
    )
    return f"--config={path}"


@pytest.fixture(scope="module")
def made(checkpoint, config, tmp_path_factory) -> dict[str, Path]:
    """What the main path makes of the checkpoint, before the export."""
    folder = tmp_path_factory.mktemp("made")
    found = {name: folder / name for name in ("packed", "run", "packed_run", "second_run")}
    command("quantize", config, f"--checkpoint={checkpoint}", f"--workdir={found['packed']}")
    command("train", config, f"--workdir={found['run']}")
    again = [f"--config.model.checkpoint={found['run']}", f"--workdir={found['second_run']}"]
    command("train", config, *again)
    command("quantize", f"--checkpoint={found['run']}", f"--workdir={found['packed_run']}")
    return found


@pytest.mark.parametrize("name", ["packed", "run", "packed_run", "second_run"])
def test_what_is_no_text_decoder_reaches_the_artefact_byte_for_byte(
    checkpoint, made, name, tmp_path
):
    out = tmp_path / "out"
    command("export", f"--checkpoint={made[name]}", "--format=hf", f"--workdir={out}")
    before, after = read_shipment(checkpoint), read_shipment(out)
    names = before.carried.keys() - {"lm_head.weight"}  # the table itself, which was quantized
    assert after.carried.keys() == names and names > TOWERS.keys()
    for key in names:
        left, right = before.carried[key], after.carried[key]
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert bytes(left.read(0, left.num_bytes)) == bytes(right.read(0, right.num_bytes))
    assert after.released_config["vision_config"] == before.released_config["vision_config"]
    assert after.files.keys() == before.files.keys() >= {"preprocessor_config.json"}
    for file in after.files:
        assert (out / file).read_bytes() == (checkpoint / file).read_bytes()


def test_a_text_format_tells_what_it_left_out(made, tmp_path):
    command(
        "export",
        f"--checkpoint={made['packed']}",
        "--format=gguf",
        f"--workdir={tmp_path / 'out'}",
        "--allow_rescale",
    )
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert set(certificate["left_out"]) > TOWERS.keys()


def mistake(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["gemmaqat", *map(str, arguments), "--compilation_cache=off"]) == 2
    return capsys.readouterr().err


def test_a_run_that_lost_its_base_is_refused_unless_text_is_enough(made, capsys, tmp_path):
    run = Path(shutil.copytree(made["run"], tmp_path / "run"))
    arguments = ["export", f"--checkpoint={run}", "--format=hf"]
    (run / "preprocessor_config.json").unlink()
    message = mistake(capsys, *arguments, f"--workdir={tmp_path / 'out'}")
    assert "preprocessor_config.json of the checkpoint" in message
    shutil.rmtree(run / "base")
    message = mistake(capsys, *arguments, f"--workdir={tmp_path / 'out'}")
    assert "missing" in message and "--text_only" in message and not (tmp_path / "out").exists()
    command(*arguments, "--text_only", f"--workdir={tmp_path / 'out'}")


@pytest.mark.parametrize("name", ["packed", "run"])
def test_a_recipe_other_than_that_of_the_codes_is_refused(made, config, name, capsys, tmp_path):
    arguments = ["export", config, f"--checkpoint={made[name]}", "--format=hf"]
    other = [*arguments, "--config.quantization.recipe=int8"]
    message = mistake(capsys, *other, f"--workdir={tmp_path / 'out'}")
    assert "recipe 'int8'" in message and "holds int4_channel" in message
    assert list(tmp_path.iterdir()) == []
    command(*arguments, f"--workdir={tmp_path / 'out'}")


def test_codes_are_not_quantized_again(made, config, capsys, tmp_path):
    arguments = [config, f"--checkpoint={made['packed']}", f"--workdir={tmp_path / 'out'}"]
    message = mistake(capsys, "quantize", *arguments)
    assert "quantized already (int4_channel)" in message and "gemmaqat export" in message
