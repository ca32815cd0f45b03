"""LiteRT runs what we write: our codes in the file, our logits from the interpreter."""

import collections
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import litert_parity as parity  # noqa: E402

from gemmaqat.interop.litert import FILE, read_litert, write_litert  # noqa: E402
from gemmaqat.interop.litert_session import LiteRTSession  # noqa: E402
from gemmaqat.interop.options import ExportOptions  # noqa: E402
from gemmaqat.interop.source import to_model  # noqa: E402

pytestmark = [
    pytest.mark.interop,
    # protobuf and the interpreter announce their own future.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
OPTIONS = ExportOptions(prefill_lengths=(16,), cache_length=parity.LENGTH)
TYPES = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
OPERATORS = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}


@pytest.fixture(scope="module")
def mobile(tmp_path_factory):
    model, shipment = parity.make("e2b_mini", "mobile_e2b_mini")
    folder = tmp_path_factory.mktemp("mobile")
    written = write_litert(shipment, folder, OPTIONS)
    return model, shipment, folder, written


def unpacked(data: bytes, bits: int) -> np.ndarray:
    """Codes as the format's documentation orders them, bit by bit."""
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").reshape(-1, bits)
    unsigned = stream.astype(np.int64) @ (1 << np.arange(bits))
    return np.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned)


def test_every_signature_holds_our_codes_and_scales_for_a_foreign_reader(mobile):
    _, shipment, folder, written = mobile
    raw = (folder / FILE).read_bytes()
    found = schema.ModelT.InitFromPackedBuf(raw, 0)
    assert {w.kind for w in written} == {"exact", "kept"}
    for signature in found.signatureDefs:
        tensors = {t.name.decode(): t for t in found.subgraphs[signature.subgraphIndex].tensors}
        for path, ours in shipment.tensors.items():
            if ours.grid is None:
                continue
            theirs, buffer = tensors[path], found.buffers[tensors[path].buffer]
            assert TYPES[theirs.type] == f"INT{ours.grid.bits}"
            piece = ours.read(0, ours.num_rows)
            data = raw[buffer.offset : buffer.offset + buffer.size]
            codes = unpacked(data, ours.grid.bits)
            np.testing.assert_array_equal(codes, piece.codes.reshape(-1), err_msg=path)
            scales = theirs.quantization.scale
            np.testing.assert_array_equal(scales, piece.scales.reshape(-1), err_msg=path)
            assert not theirs.quantization.zeroPoint.any()


def test_every_linear_between_activations_is_an_integer_product(mobile):
    _, shipment, folder, _ = mobile
    found = schema.ModelT.InitFromPackedBuf((folder / FILE).read_bytes(), 0)
    for signature in found.signatureDefs:
        graph, kinds = found.subgraphs[signature.subgraphIndex], collections.Counter()
        for op in graph.operators:
            if OPERATORS[found.operatorCodes[op.opcodeIndex].builtinCode] == "FULLY_CONNECTED":
                kinds[TYPES[graph.tensors[op.inputs[0]].type]] += 1
        linears = [p for p, t in shipment.tensors.items() if t.grid and not p.startswith("embed")]
        # In float: the head, and the projection whose weight is kept.
        assert kinds == {"INT8": len(linears), "FLOAT32": 2}


def test_what_is_read_back_is_the_shipment(mobile):
    model, shipment, folder, _ = mobile
    back = read_litert(folder)
    assert back.table == shipment.table and back.tensors.keys() == shipment.tensors.keys()
    for path, ours in shipment.tensors.items():
        theirs = back.tensors[path]
        one, other = ours.read(0, ours.num_rows), theirs.read(0, theirs.num_rows)
        if ours.grid is None:
            np.testing.assert_array_equal(np.reshape(one, -1), np.reshape(other, -1), err_msg=path)
        else:
            np.testing.assert_array_equal(one.codes, other.codes, err_msg=path)
            np.testing.assert_array_equal(one.scales, other.scales, err_msg=path)
    ids = jnp.arange(12)[None]
    np.testing.assert_array_equal(to_model(back)(ids).logits, model(ids).logits)


# Storage of weights and shape of the graph are independent: every one of either, once.
@pytest.mark.parametrize(
    "size, recipe",
    [
        ("e2b_mini", "q4_0_emb"),
        ("e4b_mini", "int2_channel_emb"),
        ("12b_mini", "int4_channel_emb"),
        ("31b_mini", "int8_emb"),
    ],
)
def test_weights_alone_give_our_logits_for_64_decode_steps(size, recipe):
    share, found = parity.compare(size, recipe, dynamic=False, xnnpack=True)
    assert share == 1
    assert found.largest < 2e-5  # measured 5e-6: sums of float32 in another order
    assert found.top == 1


def test_static_activations_give_our_logits_but_for_flips_of_single_codes(mobile):
    model, shipment, folder, _ = mobile
    share, found = parity.compare_written(model, shipment, folder, xnnpack=True)
    assert share == 1
    assert found.kl < 6.4e-5  # measured 1.6e-5: the runtime rounds some sums to the next code
    assert found.top == 1


def test_dynamic_activations_are_near_but_not_what_was_evaluated():
    share, found = parity.compare("e2b_mini", "int4_channel_emb", dynamic=True, xnnpack=True)
    assert share == 1
    assert 1e-3 < found.largest < 0.6  # measured 0.13


def test_a_prompt_in_pieces_equals_one_token_at_a_time(mobile):
    _, _, folder, _ = mobile
    ids = np.random.default_rng(3).integers(0, 128, 45)  # beyond the window of 32
    session = LiteRTSession(folder / FILE)
    together = session.feed(ids)
    session.reset()
    for token in ids.tolist():
        apart = session.feed([token])
    np.testing.assert_allclose(together, apart, atol=0.6)  # measured 0.1: flips of codes
