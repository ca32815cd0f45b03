"""A small converted model and its exports, which several files of tests read."""

import shutil
from pathlib import Path

import pytest
from flax import nnx

from gemmaqat.interop.export import export
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve

FORMATS = ("hf", "gguf")


@pytest.fixture(scope="module")
def converted():
    layers = ("sliding_attention", "full_attention")
    config = model_config("e2b_mini", layer_types=layers, num_kv_shared_layers=0)
    model = Gemma4(config, rngs=nnx.Rngs(0))
    table = resolve("q4_0_emb", model)
    return convert(model, table), table


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory) -> dict[str, Path]:
    model, table = converted
    root = tmp_path_factory.mktemp("exported")
    for name in FORMATS:
        export(model, root / name, format=name, table=table)
    return {name: root / name for name in FORMATS}


@pytest.fixture
def copied(exported, tmp_path):
    return lambda name: Path(shutil.copytree(exported[name], tmp_path / name))
