import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import gemmaqat as gq
from gemmaqat.interop.litert import FILE, read_litert, write_litert
from gemmaqat.interop.litert_file import LiteRTFile
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.shipment import CarriedTensor
from gemmaqat.interop.source import of_model

# Made by `write_litert` from `tiny_shipment()`; one layer, so that it is a few kilobytes.
TINY = Path(__file__).parents[1] / "golden" / "litert_tiny.tflite"
TINY_CONFIG = dict(
    vocab_size=32,
    embed_dim=32,
    mlp_dim=32,
    num_heads=1,
    num_kv_heads=1,
    num_global_kv_heads=1,
    head_dim=16,
    global_head_dim=16,
    layer_types=("full_attention",),
    attention_k_eq_v=False,
)


def tiny_shipment(recipe: str = "int4_channel_emb", size: str = "31b_mini", **fields):
    model = gq.Gemma4(gq.model_config(size, **(fields or TINY_CONFIG)), rngs=nnx.Rngs(0))
    table = gq.resolve(recipe, model)
    return of_model(gq.convert(model, table), table)


def test_reader_needs_no_library_and_gives_our_codes_and_scales():
    ours, theirs = tiny_shipment(), read_litert(TINY)
    assert theirs.tensors.keys() == ours.tensors.keys()
    for path, tensor in ours.tensors.items():
        one, other = (t.read(0, t.num_rows) for t in (tensor, theirs.tensors[path]))
        if tensor.grid is None:
            np.testing.assert_array_equal(one, other, err_msg=path)
        else:
            np.testing.assert_array_equal(one.codes, other.codes, err_msg=path)
            np.testing.assert_array_equal(one.scales, other.scales, err_msg=path)


def test_rows_are_read_from_anywhere():
    tensor = read_litert(TINY).tensors["layers/0/mlp/up_proj/weight"]
    whole, part = tensor.read(0, tensor.num_rows), tensor.read(5, 9)
    np.testing.assert_array_equal(part.codes, whole.codes[5:9])
    np.testing.assert_array_equal(part.scales, whole.scales[5:9])


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 3_000, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / FILE
    path.write_bytes(TINY.read_bytes()[:keep])
    with pytest.raises(ValueError, match=str(path)):
        read_litert(path)


def test_damaged_bytes_are_refused_or_read_but_never_crash(tmp_path):
    intact, random = TINY.read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / FILE, 0
    for _ in range(60):
        damaged = bytearray(intact)
        for place in random.integers(0, len(intact), 4):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            for tensor in read_litert(path).tensors.values():
                tensor.read(0, tensor.num_rows)
        except ValueError:
            refused += 1
    assert refused > 5


def test_both_signatures_share_one_copy_of_each_weight():
    found = LiteRTFile(TINY)
    assert set(found.signatures) == {"prefill_1", "decode"}
    path = "layers/0/mlp/up_proj/weight"
    starts = {t.start for graph in found.graphs for t in graph if t.name == path}
    assert len(starts) == 1 and starts.pop() % 64 == 0


@pytest.mark.parametrize(
    "shipment, options, message",
    [
        (lambda: tiny_shipment(size="26b_a4b_mini", remat="none"), {}, "has experts"),
        (lambda: tiny_shipment("int2_mid_channel"), {}, "half-integer"),
        (lambda: tiny_shipment(), dict(prefill_lengths=(64,), cache_length=32), "prefill_lengths"),
        (lambda: tiny_shipment(), dict(prefill_lengths=()), "prefill_lengths"),
    ],
    ids=["experts", "half levels", "prefill longer than cache", "no prefill"],
)
def test_what_cannot_be_held_is_refused(tmp_path, shipment, options, message):
    with pytest.raises(ValueError, match=message):
        write_litert(shipment(), tmp_path, ExportOptions(**options))
    assert not list(tmp_path.iterdir())


def test_towers_are_left_out_only_when_asked(tmp_path):
    tower = CarriedTensor(
        name="vision.weight", dtype="F32", shape=(), read=lambda a, b: memoryview(b""), num_bytes=0
    )
    shipment = dataclasses.replace(tiny_shipment(), carried={tower.name: tower})
    with pytest.raises(ValueError, match="vision.weight.*text_only"):
        write_litert(shipment, tmp_path, ExportOptions())
