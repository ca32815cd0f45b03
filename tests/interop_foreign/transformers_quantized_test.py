"""Transformers on our compressed-tensors and mobile folders: a clean report and our logits."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from gemmaqat.interop.compressed_tensors import write_compressed_tensors
from gemmaqat.interop.compressed_tensors_reader import read_compressed_tensors
from gemmaqat.interop.gemma_mobile import write_gemma_mobile
from gemmaqat.interop.gemma_mobile_reader import read_gemma_mobile
from gemmaqat.interop.hf import read_config
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.source import of_folder, of_model, to_model
from gemmaqat.models.sizes import MINIATURES, model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.packed import PackedTensor
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization import trees
from gemmaqat.quantization.activations import (
    activation_scales,
    prepare,
    quantize_by_token,
    with_scales,
    without_activations,
)
from gemmaqat.quantization.calibration import calibrate
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve
from gemmaqat.quantization.table import ON

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # of the libraries under test, which warn a lot
]
GOLDEN = Path(__file__).parents[1] / "golden" / "gemma4"
IDS = np.random.default_rng(0).integers(3, 128, (2, 40))
TOLERANCE = 1e-5  # measured 5e-6: the order of sums
# Of a position where the order of sums has put an activation on the other side of a rounding: it
# differs by a whole step, and so do some of those computed from it. Measured up to a sixth of the
# logits' standard deviation, which is 0.95 here.
OTHER_SIDE = 0.25
# Every channel its own scale where a block does not divide; the format then has two groups.
ANY_LENGTH = dict(weight_qtype="int4", scale_rule="absmax", scale_dtype="bfloat16", scale_bits=5)


def their_logits(folder: Path, **options) -> np.ndarray:
    """Of transformers in float32, after a look at its loading report."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **options,
    )
    assert {name: list(keys) for name, keys in report.items() if keys} == {}
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def our_logits(shipment) -> np.ndarray:
    return np.asarray(to_model(shipment)(jnp.asarray(IDS)).logits)


def converted(size: str, recipe: str, rules=()):
    model = Gemma4(model_config(size), rngs=nnx.Rngs(0))
    table = resolve(recipe, model, rules=rules)
    return of_model(convert(model, table), table)


@pytest.mark.parametrize("size", MINIATURES)
@pytest.mark.parametrize("dequantize", [False, True], ids=["default path", "dequantize"])
@pytest.mark.parametrize("recipe", ["w4a16_g32", "q4_0_emb"])
def test_blocks_of_32_give_our_logits(size, dequantize, recipe, tmp_path):
    shipment = converted(size, recipe)
    write_compressed_tensors(shipment, tmp_path, ExportOptions())
    options = {}
    if dequantize:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    found = their_logits(tmp_path, **options)
    np.testing.assert_allclose(found, our_logits(shipment), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("recipe", ["int8", "int4_channel", "int3_channel", "int2_channel"])
def test_channel_scales_of_other_widths_give_our_logits(recipe, tmp_path):
    shipment = converted("e2b_mini", recipe)
    write_compressed_tensors(shipment, tmp_path, ExportOptions())
    found = their_logits(tmp_path)
    np.testing.assert_allclose(found, our_logits(shipment), rtol=0, atol=TOLERANCE)


def test_grids_side_by_side_load_on_the_default_path(tmp_path):
    rules = [dict(module_path=r"layers/\d+/mlp/.*", weight_qtype="int8", scale_rule="absmax"),
             dict(module_path=r"layers/0/self_attn/o_proj", weight_qtype=None)]  # fmt: skip
    shipment = converted("e2b_mini", "w4a16_g32", rules)
    write_compressed_tensors(shipment, tmp_path, ExportOptions())
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert len(section["config_groups"]) == 2
    assert "model.layers.0.self_attn.o_proj" in section["ignore"]
    found = their_logits(tmp_path)
    np.testing.assert_allclose(found, our_logits(shipment), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", ["e2b_mini", "31b_mini"])
def test_packed_tables_and_their_head_load_when_dequantized(size, tmp_path):
    shipment = converted(size, "w4a16_g32_emb")
    write_compressed_tensors(shipment, tmp_path, ExportOptions(packed_tables=True))
    with pytest.raises(AttributeError, match="weight"):  # the default path, as we say
        their_logits(tmp_path)
    found = their_logits(tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True))
    np.testing.assert_allclose(found, our_logits(shipment), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["e2b", "e4b", "12b", "26b", "31b"])
def test_a_released_layout_stays_one_and_loads(case, tmp_path):
    table = resolve([dict(module_path=r"layers/\d+/(self_attn|mlp|experts)/.*", **ANY_LENGTH),
                     dict(module_path=".*")], abstract_of(case))  # fmt: skip
    shipment = of_folder(GOLDEN / case, table)
    written = write_compressed_tensors(shipment, tmp_path, ExportOptions())
    assert {"exact", "kept"} <= {told.kind for told in written}
    found = their_logits(tmp_path)
    back = read_compressed_tensors(tmp_path)
    # Logits of these are six times as large, and their float models are 1.3e-4 apart.
    np.testing.assert_allclose(found, our_logits(back), rtol=0, atol=5e-4)
    assert back.carried.keys() == shipment.carried.keys()


def abstract_of(case: str):
    return abstract_model(read_config(GOLDEN / case))


def mobile(size: str, clamps: float, *, projection: bool = False):
    """A prepared miniature whose clamps are those that transformers applies, one scale per row."""
    bits = "int4" if size == "e2b_mini" else "int2"
    model = Gemma4(model_config(size), rngs=nnx.Rngs(0))
    rules = [dict(module_path="embed_tokens_per_layer", weight_qtype=bits, scale_rule="mse")]
    table = resolve(f"mobile_{size}", model, rules=rules)
    model = prepare(model, table)
    scales = {
        hook: 0.0 if _is_not_theirs(hook, projection) else clamps * (1 + i / 100)
        for i, hook in enumerate(activation_scales(model))
    }
    return of_model(convert(with_scales(model, scales), table), table)


def assert_near_up_to_roundings(found: np.ndarray, expected: np.ndarray) -> None:
    """All but a few of the 80 positions within `TOLERANCE`, those within `OTHER_SIDE`."""
    apart = np.abs(found - expected).max(axis=-1)
    assert np.mean(apart <= TOLERANCE) >= 0.95, apart
    assert apart.max() <= OTHER_SIDE, apart


def _is_not_theirs(hook: str, projection: bool) -> bool:
    """Whether transformers leaves the clamp out; that of the projection by the mobile format."""
    if hook.startswith("per_layer_model_projection"):
        return not projection
    return hook.removesuffix("/scale").endswith(("/k", "/v"))


@pytest.mark.parametrize("size", ["e2b_mini", "e4b_mini"])
@pytest.mark.parametrize("clamps", [0.0, 0.03], ids=["off", "clamped"])
def test_a_mobile_folder_gives_our_logits_with_clamps_and_without(size, clamps, tmp_path):
    shipment = mobile(size, clamps)
    write_gemma_mobile(shipment, tmp_path, ExportOptions())
    expected = our_logits(shipment)
    found = their_logits(tmp_path)
    assert_near_up_to_roundings(found, expected)
    assert np.array_equal(our_logits(read_gemma_mobile(tmp_path)), expected)


def test_static_clamps_in_compressed_tensors_are_applied_by_transformers(tmp_path):
    """The float projection's too, which the mobile format has no place for."""
    shipment = mobile("e2b_mini", 0.03, projection=True)
    write_compressed_tensors(shipment, tmp_path, ExportOptions())
    assert_near_up_to_roundings(their_logits(tmp_path), our_logits(shipment))


@pytest.fixture(scope="module", params=MINIATURES)
def w8a8(request, tmp_path_factory):
    """Our model with dynamic inputs, the logits of theirs, and what its linears took and gave."""
    model = Gemma4(model_config(request.param), rngs=nnx.Rngs(0))
    table = resolve("w8a8", model)
    shipment = of_model(convert(calibrate(model, table, []), table), table)
    folder = tmp_path_factory.mktemp("w8a8")
    write_compressed_tensors(shipment, folder, ExportOptions())
    seen = {}

    def watch(module, inputs, output):
        if isinstance(module, torch.nn.Linear):
            seen[module] = inputs[0].numpy(), output.numpy()

    with torch.nn.modules.module.register_module_forward_hook(watch):
        logits = their_logits(folder)
    return to_model(shipment), logits, seen


def test_w8a8_linears_of_transformers_have_our_weights_and_round_their_inputs_as_ours(w8a8):
    ours, _, seen = w8a8
    expected = {
        path: np.asarray(value.dequantize())
        for path, (value, _) in trees.weights(ours).items()
        if isinstance(value, PackedTensor) and "/experts/" not in path
    }
    for module, (x, y) in seen.items():
        theirs = module.weight.detach().numpy().T
        same = [p for p, w in expected.items() if w.shape == theirs.shape and (w == theirs).all()]
        if not same:  # the head and the router, which are float
            continue
        weight = expected.pop(same[0])
        rounded = quantize_by_token(jnp.asarray(x), jnp.float32(ON))
        # Measured 4e-6: the order of sums.
        np.testing.assert_allclose(y, np.asarray(rounded) @ weight, rtol=0, atol=TOLERANCE)
    assert not expected


def test_logits_of_w8a8_are_ours_but_for_roundings(w8a8):
    """A token's largest magnitude stands at 127.5 of its steps: a tie, if it is negative.

    The order of sums then decides between -128 and -127, and later tokens see it. Measured: up to
    0.09, on average (RMS) a tenth to a half of what rounding the inputs does at all.
    """
    ours, found, _ = w8a8
    expected = np.asarray(ours(jnp.asarray(IDS)).logits)
    off = np.asarray(without_activations(ours)(jnp.asarray(IDS)).logits)
    apart, effect = (np.sqrt(np.mean(np.square(x - expected))) for x in (found, off))
    assert apart < effect
    assert np.abs(found - expected).max() <= OTHER_SIDE


def test_clamps_matter_by_far_more_than_the_tolerance(tmp_path):
    with_clamps, without = (our_logits(mobile("e2b_mini", scale)) for scale in (0.03, 0.0))
    assert np.abs(with_clamps - without).max() > 1e-2


def test_the_form_of_the_scales_that_we_say_it_rejects_is_rejected(tmp_path):
    model = Gemma4(model_config("e2b_mini"), rngs=nnx.Rngs(0))
    table = resolve("mobile_e2b_mini", model)
    shipment = of_model(convert(prepare(model, table), table), table)
    write_gemma_mobile(shipment, tmp_path, ExportOptions(per_layer_scales=True))
    with pytest.raises(Exception, match="embed_tokens_per_layer|ignore_mismatched_sizes"):
        their_logits(tmp_path)
