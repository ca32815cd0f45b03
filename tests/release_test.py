"""Every cell of the release matrix: its config opens, resolves at full size, trains and ships."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import jax
import pytest

from gemmaqat import config as configs
from gemmaqat.interop.formats import FORMATS
from gemmaqat.main import main
from gemmaqat.models.sizes import model_config
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.rules import resolve

FOLDER = Path(__file__).parents[1] / "experiments" / "release"
ALL = ("e2b", "e4b", "12b", "26b_a4b", "31b")
MATRIX = {
    "unquantized": ALL,
    "q4_0_gguf": ALL,
    "w4a16": ("e2b", "e4b", "12b", "31b"),
    "mobile_transformers": ("e2b", "e4b"),
    "mobile_ct": ("e2b", "e4b"),
    "litert": ("e2b", "e4b"),
}
CELLS = [(name, size) for name, sizes in MATRIX.items() for size in sizes]
QUICK = (("q4_0_gguf", "e2b"),)

pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning"  # of ml_collections, opening a config
)

each_cell = pytest.mark.parametrize("name, size", CELLS)
each_file = pytest.mark.parametrize("name", MATRIX)


def _module(name: str):
    spec = importlib.util.spec_from_file_location("release", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_file_for_every_column():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(MATRIX)


@each_file
def test_a_file_has_its_sizes_and_refuses_others(name):
    module = _module(name)
    assert module.SIZES == MATRIX[name]
    with pytest.raises(ValueError, match="'3b' is not one of"):
        module.get_config("3b")


@each_file
def test_a_file_imports_only_the_config_and_gives_both_commands(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imported = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert imported == ["gemmaqat.config"]
    text = re.sub(r"\s*\\\n\s*", " ", ast.get_docstring(tree) or "")
    config = f"--config=experiments/release/{name}.py"
    assert f"gemmaqat train {config} --workdir=runs/e2b_{name}\n" in text
    assert f"gemmaqat export {config} --checkpoint=runs/e2b_{name} --workdir=shipped" in text
    lines = (FOLDER / "README.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith(f"| `{name}.py`")]) == 1


@each_cell
def test_a_cell_resolves_at_full_size_and_names_its_format(name, size):
    experiment = configs.parse(_module(name).get_config(size))
    assert experiment.export.format in FORMATS and experiment.train.method == "distill"
    assert experiment.model.checkpoint == experiment.data.tokenizer
    table = resolve(
        experiment.quantization.recipe,
        abstract_model(model_config(size)),
        rules=experiment.quantization.rules,
    )
    grids = {entry.path: entry.grid for entry in table.entries}
    assert grids["layers/0/mlp/up_proj/weight"] is not None
    assert grids.get("per_layer_model_projection/weight") is None
    assert bool(table.activations) == (name in ("mobile_transformers", "mobile_ct", "litert"))
    assert (grids["embed_tokens/weight"] is None) == (name == "w4a16")


@pytest.mark.parametrize(
    "name, size",
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in CELLS],
)
def test_a_cell_trains_and_ships_as_a_miniature(name, size, tmp_path):
    if name == "litert":
        pytest.importorskip("litert_converter", reason="needs the extra `litert`")
    run, out = f"{tmp_path}/run", f"{tmp_path}/out"
    config = f"--config={FOLDER / name}.py:{size}"
    assert main(["gemmaqat", "train", config, "--tiny", f"--workdir={run}"]) == 0
    # format and options are those of the run's own config
    assert main(["gemmaqat", "export", f"--checkpoint={run}", f"--workdir={out}"]) == 0
    certificate = json.loads(Path(out, "certificate.json").read_text())
    assert certificate["format"] == _module(name).get_config(size).export.format
    kinds = {tensor["kind"] for tensor in certificate["tensors"]}
    assert kinds <= {"exact", "kept"}, kinds
    assert main(["gemmaqat", "verify", f"--checkpoint={out}"]) == 0


@pytest.fixture(scope="module", autouse=True)
def _programs_are_compiled_once(tmp_path_factory):
    """Cells with the same miniature share compiled programs through the persistent cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
