"""Transformers on our float folders: nothing missing, nothing unexpected, our logits."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from gemmaqat.interop.export import export
from gemmaqat.interop.hf import read_config
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.source import of_folder, of_model, to_model
from gemmaqat.models.sizes import MINIATURES, model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # of the libraries under test, which warn a lot
]
GOLDEN = Path(__file__).parents[1] / "golden" / "gemma4"
IDS = np.random.default_rng(0).integers(3, 128, (2, 40))
TOLERANCE = 5e-4  # float32 on both sides; sums are taken in other orders


def their_logits(folder: Path) -> np.ndarray:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert {name: list(keys) for name, keys in report.items() if keys} == {}
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("size", MINIATURES)
@pytest.mark.parametrize("float_dtype", ["float32", "bfloat16"])
def test_values_on_the_grid_load_cleanly_and_give_our_logits(size, float_dtype, tmp_path):
    model = Gemma4(model_config(size), rngs=nnx.Rngs(0))
    table = resolve("q4_0_emb", model)
    shipment = of_model(convert(model, table), table)
    options = ExportOptions(float_dtype=float_dtype, shard_bytes=300_000)
    certificate = export(shipment, tmp_path / "out", format="hf", options=options)
    assert certificate.exact_share == 1
    # Kept matrices (the router's) are rounded to bfloat16, so ours are read from the folder, too.
    ours = to_model(of_folder(tmp_path / "out", resolve("none", model)))
    expected = np.asarray(ours(jnp.asarray(IDS)).logits)
    np.testing.assert_allclose(their_logits(tmp_path / "out"), expected, rtol=0, atol=TOLERANCE)
    stored = load_file(next((tmp_path / "out").glob("*.safetensors")))
    kinds = {tensor.dtype for tensor in stored.values() if tensor.ndim == 2}
    assert kinds == {np.dtype(getattr(ml_dtypes, float_dtype, np.float32))}


@pytest.mark.parametrize("case", ["e2b", "e4b", "12b", "26b", "31b"])
def test_released_layouts_survive_the_round_trip(case, tmp_path):
    source = Path(shutil.copytree(GOLDEN / case, tmp_path / case))
    table = resolve("int8_emb", abstract_model(read_config(source)))
    options = ExportOptions(float_dtype="float32")  # 8-bit codes are not exact in bfloat16
    certificate = export(source, tmp_path / "out", format="hf", table=table, options=options)
    assert certificate.left_out == ()
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    ours = to_model(of_folder(source, table))
    expected = np.asarray(ours(jnp.asarray(IDS)).logits)
    np.testing.assert_allclose(their_logits(tmp_path / "out"), expected, rtol=0, atol=TOLERANCE)
