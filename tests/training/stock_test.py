"""A checkpoint trained with the default recipe goes through llama.cpp's stock quantizer whole."""

import gguf
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from gemmaqat.interop.export import export
from gemmaqat.interop.hf import tensor_name
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.source import of_model, values
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve

Q4_0 = gguf.GGMLQuantizationType.Q4_0


@pytest.fixture(scope="module")
def kept(model, run, experiment, tmp_path_factory):
    """Trains two steps with a recipe, exports bfloat16 floats, quantizes these by the gguf package:
    the shares of codes and of values that are ours.
    """
    graph, _ = nnx.split(model)

    def kept(recipe: str) -> tuple[float, float]:
        table = resolve(recipe, model)
        sections = experiment(train=dict(num_steps=2), quantization=dict(recipe=recipe))
        folder = tmp_path_factory.mktemp(recipe)
        params = run(folder / "run", sections, table=table).params
        packed = convert(nnx.merge(graph, params), table)
        # Off the anchored grid bfloat16 rounds some values: that is part of the question.
        options = ExportOptions(float_dtype="bfloat16", allow_requantize=True)
        export(packed, folder / "hf", format="hf", table=table, options=options)
        files = (folder / "hf").glob("*.safetensors")
        stored = {name: array for file in files for name, array in load_file(file).items()}
        codes, equal = [], []
        for path, tensor in of_model(packed, table).tensors.items():
            if tensor.grid is None:
                continue
            (name,) = [name for name in stored if name.endswith(tensor_name(path))]
            rows = stored[name].astype(np.float32).reshape(tensor.num_rows, -1)
            raw = gguf.quantize(rows, Q4_0)
            nibbles = raw.reshape(-1, 18)[:, 2:]
            theirs = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.int8) - 8
            ours = tensor.read(0, tensor.num_rows)
            codes.append((theirs == ours.codes.reshape(theirs.shape)).ravel())
            equal.append((gguf.dequantize(raw, Q4_0) == values(tensor, ours)).ravel())
        return float(np.concatenate(codes).mean()), float(np.concatenate(equal).mean())

    return kept


@pytest.mark.parametrize("recipe", ["q4_0", "w4a16_g32"])
def test_the_stock_quantizer_keeps_every_code_and_value_of_a_trained_checkpoint(kept, recipe):
    assert kept(recipe) == (1.0, 1.0)


def test_it_moves_most_codes_of_a_trained_absmax_grid(kept):
    codes, equal = kept("w4a16_g32_free")
    assert codes < 0.7 and equal < 0.7
