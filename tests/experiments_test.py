"""Every file in experiments/: it opens, resolves at full size, says its command, and runs tiny."""

import ast
import importlib.util
import re
from pathlib import Path

import jax
import pytest

from gemmaqat import config as configs
from gemmaqat.compare import compare
from gemmaqat.models.sizes import model_config
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.rules import resolve
from gemmaqat.training.loop import train

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = sorted(FOLDER.glob("*.py"))

QUICK = ("quickstart", "e2b_own_data")  # a comparison and a training, one miniature

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
each_file_some_slowly = pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in QUICK else pytest.mark.slow) for p in FILES],
    ids=lambda path: path.stem,
)


def _config(path: Path):
    spec = importlib.util.spec_from_file_location("experiment", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _command(path: Path) -> str:
    """The verb whose command the docstring gives with a work directory."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = re.findall(rf"gemmaqat (\w+) --config=experiments/{path.name} --workdir=", text)
    assert len(found) == 1, f"{path}: one command with --workdir belongs in the docstring: {found}"
    return found[0]


@each_file
def test_the_config_has_known_fields_and_agreeing_values(path):
    config = _config(path)
    experiment = configs.parse(config)
    assert configs.parse(configs.tiny(config)).train.num_steps == 2
    if experiment.model.checkpoint:  # published weights come with their own tokens
        assert experiment.data.tokenizer == experiment.model.checkpoint
        assert experiment.data.source == "files"


@each_file
def test_the_docstring_and_the_table_name_the_file_and_its_verb(path):
    verb = _command(path)
    lines = (FOLDER / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| `{path.name}")]
    assert len(rows) == 1 and f"`{verb}`" in rows[0], rows


@each_file
def test_every_rule_finds_its_parameters_at_full_size_and_in_miniature(path):
    config = _config(path)
    for experiment in (configs.parse(config), configs.parse(configs.tiny(config))):
        if _command(path) == "compare":
            asked = [(s, r) for s in experiment.compare.sizes for r in experiment.compare.recipes]
        else:
            asked = [(experiment.model.name, experiment.quantization.recipe)]
        for size, recipe in asked:
            model = abstract_model(model_config(size))
            table = resolve(recipe, model, rules=experiment.quantization.rules)
            assert all(entry.grid or entry.reason for entry in table.entries)
            if recipe != "none":
                assert 1.5 < table.bits_per_weight(quantized_only=True) < 10, (size, recipe)


@each_file_some_slowly
def test_the_tiny_variant_runs(path, tmp_path):
    config = configs.tiny(_config(path))
    if _command(path) == "compare":
        config.compare.recipes = config.compare.recipes[-1:]
        compare(config, tmp_path)
        assert (tmp_path / "summary.json").is_file() and (tmp_path / "report.html").is_file()
    else:
        result = train(config, tmp_path)
        assert result.steps == 2
        assert (tmp_path / "metrics.jsonl").is_file()
        quantized = config.train.method != "none"
        assert (tmp_path / "quantization.json").is_file() == quantized


@pytest.fixture(scope="module", autouse=True)
def _programs_are_compiled_once(tmp_path_factory):
    """Files with the same miniature share compiled programs through the persistent cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
