"""GGUF files of every topology, judged by the `gguf` package and by our own reader."""

import dataclasses
import functools
import io
import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from gemmaqat.interop import hf
from gemmaqat.interop.gguf_reader import read_gguf
from gemmaqat.interop.gguf_writer import write_gguf
from gemmaqat.interop.grid_metadata import GRIDS_KEY, grids_metadata
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.seal import BLANK, PLACES
from gemmaqat.interop.shipment import Piece, Shipment, ShippedTensor
from gemmaqat.interop.source import pieces, values
from gemmaqat.models.sizes import model_config
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.grids import TENSOR, Grid
from gemmaqat.quantization.rule import Rule
from gemmaqat.quantization.rules import resolve

CONFIGS = {
    "e2b": model_config("e2b_mini"),
    "e4b": model_config("e4b_mini"),
    "12b": model_config("12b_mini"),
    "26b": model_config("26b_a4b_mini"),
    "31b": model_config("31b_mini"),
}
EMBEDDINGS = r"embed_tokens(_per_layer)?"


def quantized(rng: np.random.Generator, grid: Grid, shape: tuple[int, ...]) -> Piece:
    rows, length = int(np.prod(shape[:-1])), shape[-1]
    codes = rng.integers(grid.lowest, grid.highest + 1, (rows, length)).astype(np.int8)
    # 5 significant bits: what every format holds.
    scales = rng.integers(16, 32, (rows, grid.num_blocks(length))) * 2.0**-10
    scales = np.broadcast_to(scales[:1], scales.shape) if grid.block == TENSOR else scales
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(grid.scale_dtype, grid.scale_dtype)
    return Piece(codes, scales.astype(dtype))


def shipment(config, *rules: Rule | str, seed: int = 0, dtype=np.float32, **fields) -> Shipment:
    """Random codes and floats for a resolved table; no model is computed."""
    rng = np.random.default_rng(seed)
    table = resolve(rules[0] if isinstance(rules[0], str) else list(rules), abstract_model(config))
    tensors = {}
    for entry in table.entries:
        shape = hf.stored_shape(entry.path, entry.shape)
        if entry.grid is None:
            content = rng.standard_normal((int(np.prod(shape[:-1])) if len(shape) > 1 else 1,
                                           shape[-1])).astype(dtype)  # fmt: skip
            read = lambda a, b, content=content: content[a:b]  # noqa: E731
        else:
            piece = quantized(rng, entry.grid, shape)
            read = lambda a, b, piece=piece: Piece(*(part[a:b] for part in piece))  # noqa: E731
        tensors[entry.path] = ShippedTensor(
            path=entry.path, shape=shape, grid=entry.grid, dtype=np.dtype(dtype), read=read
        )
    return Shipment(config=config, table=table, tensors=tensors, **fields)


def whole(tensor: ShippedTensor) -> np.ndarray:
    return values(tensor, tensor.read(0, tensor.num_rows)).reshape(tensor.shape)


def written(made: Shipment, folder: Path, **options) -> tuple[Path, dict]:
    kinds = {w.path: w for w in write_gguf(made, folder, ExportOptions(**options))}
    (path,) = folder.iterdir()
    return path, kinds


def int4(pattern: str = ".*", **fields) -> Rule:
    return Rule(module_path=pattern, weight_qtype="int4", scale_dtype="float16", **fields)


@pytest.mark.parametrize("size", CONFIGS)
def test_every_tensor_of_a_topology_returns_with_its_codes_and_scales(tmp_path, size):
    made = shipment(CONFIGS[size], "q4_0_emb")
    path, kinds = written(made, tmp_path)
    back = read_gguf(path)
    assert dataclasses.replace(back.config, name=made.config.name) == made.config
    assert list(back.tensors) == list(made.tensors) == list(back.table.by_path)
    for name, tensor in made.tensors.items():
        again = back.tensors[name]
        assert again.shape == tensor.shape, name
        found, original = again.read(0, again.num_rows), tensor.read(0, tensor.num_rows)
        if again.grid is None:
            assert kinds[name].kind == ("kept" if tensor.grid is None else "exact")
            np.testing.assert_array_equal(found, whole(tensor).reshape(found.shape), name)
        else:
            assert kinds[name] == (name, "exact", "Q4_0", "")
            assert again.grid == back.table[name].grid == tensor.grid  # anchor and all
            np.testing.assert_array_equal(found.codes, original.codes, name)
            np.testing.assert_array_equal(found.scales, original.scales, name)


@pytest.mark.parametrize("size", CONFIGS)
def test_the_gguf_package_reads_our_values_and_only_known_names(tmp_path, size):
    made = shipment(CONFIGS[size], int4(tile_size=32))
    path, _ = written(made, tmp_path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, made.config.num_layers)
    reader = gguf.GGUFReader(path)
    theirs = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    for tensor in made.tensors.values():
        key = hf.tensor_name(tensor.path).removesuffix(".weight")
        known = names.get_name(f"model.{key}") or names.get_name(f"model.language_model.{key}")
        found = [n for n in theirs if known and n.startswith(f"{known}.")]
        if tensor.path.endswith("router/scale"):
            found = [f"blk.{tensor.path.split('/')[1]}.ffn_gate_inp.scale"]
        elif tensor.path.endswith("per_expert_scale"):
            found = [f"blk.{tensor.path.split('/')[1]}.ffn_down_exps.scale"]
        elif len(found) > 1:
            found = [n for n in found if n.endswith(".weight")]
        assert len(found) == 1, tensor.path
        value = theirs.pop(found[0])
        np.testing.assert_array_equal(value.reshape(tensor.shape), whole(tensor), tensor.path)
    assert list(theirs) == ["rope_freqs.weight"]


def test_metadata_holds_every_key_llama_cpp_needs(tmp_path):
    path, _ = written(shipment(CONFIGS["e2b"], "q4_0"), tmp_path)
    fields = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}
    expected = {
        "general.architecture": "gemma4",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "gemma4.block_count": 4,
        "gemma4.embedding_length": 64,
        "gemma4.feed_forward_length": [128, 128, 256, 256],
        "gemma4.attention.head_count": 2,
        "gemma4.attention.head_count_kv": 1,
        "gemma4.attention.key_length": 64,
        "gemma4.attention.key_length_swa": 32,
        "gemma4.attention.value_length_swa": 32,
        "gemma4.attention.sliding_window": 32,
        "gemma4.attention.sliding_window_pattern": [True, False, True, False],
        "gemma4.attention.shared_kv_layers": 2,
        "gemma4.embedding_length_per_layer_input": 64,
        "gemma4.rope.freq_base": 1e6,
        "gemma4.rope.freq_base_swa": 1e4,
        "gemma4.rope.dimension_count": 64,
        "gemma4.rope.dimension_count_swa": 32,
        "gemma4.final_logit_softcapping": 30.0,
        **PLACES,
        "gemmaqat.synthetic_vocabulary": True,
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert {key: fields[key] for key in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"]) == 128
    # The hash is patched in place: 64 characters, once.
    assert path.read_bytes().count(BLANK.encode()) == 2


def test_a_model_without_softcap_says_zero_since_a_missing_cap_means_thirty(tmp_path):
    config = dataclasses.replace(CONFIGS["31b"], final_logit_softcap=float("inf"))
    path, _ = written(shipment(config, "none"), tmp_path)
    fields = gguf.GGUFReader(path).fields
    assert fields["gemma4.final_logit_softcapping"].contents() == 0.0
    assert fields["general.file_type"].contents() == 0
    assert "general.quantization_version" not in fields
    assert read_gguf(path).config.final_logit_softcap == float("inf")


def test_rope_factors_leave_a_quarter_of_a_global_head_rotating(tmp_path):
    path, _ = written(shipment(CONFIGS["e2b"], "none"), tmp_path)
    (factors,) = [t.data for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight"]
    np.testing.assert_array_equal(factors, np.array([1.0] * 8 + [1e30] * 24, np.float32))


GRIDS = {  # rule -> stored type of a matrix with K = 64 (q_proj) and with K = 256 (down_proj)
    "channel": (int4(), "Q4_0", "Q4_0"),
    "tensor": (int4(disable_channelwise_axes=True), "Q4_0", "Q4_0"),
    "block 64": (int4(tile_size=64), "Q4_0", "Q4_0"),
    "int3": (Rule(weight_qtype="int3", scale_dtype="float16"), "Q4_0", "Q4_0"),
    "int2 channel": (Rule(weight_qtype="int2", scale_dtype="float16"), "Q4_0", "Q2_K"),
    "int2 channel in float32": (Rule(weight_qtype="int2"), "Q4_0", "Q2_K"),
    "ternary": (Rule(weight_qtype="ternary", scale_dtype="float16"), "Q4_0", "Q2_K"),
    "int2 block 32": (
        Rule(weight_qtype="int2", tile_size=32, scale_dtype="float16"),
        "Q4_0",
        "Q4_0",
    ),
    "int8 channel": (Rule(weight_qtype="int8", scale_dtype="bfloat16"), "Q8_0", "Q8_0"),
    "int8 block 32": (
        Rule(weight_qtype="int8", tile_size=32, scale_dtype="float16"),
        "Q8_0",
        "Q8_0",
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_go_exactly_into_the_smallest_type_that_holds_them(tmp_path, name):
    rule, narrow, wide = GRIDS[name]
    made = shipment(CONFIGS["12b"], rule)
    path, kinds = written(made, tmp_path)
    back = read_gguf(path)
    for module, stored in (("self_attn/q_proj", narrow), ("mlp/down_proj", wide)):
        weight = f"layers/0/{module}/weight"
        assert (kinds[weight].kind, kinds[weight].stored) == ("exact", stored)
        found, original = back.tensors[weight], made.tensors[weight]
        ours, theirs = original.read(0, 8), found.read(0, 8)
        assert found.grid == original.grid or name == "tensor"  # then it comes back as blocks
        np.testing.assert_array_equal(theirs.codes, ours.codes)
        repeat = theirs.scales.shape[1] // ours.scales.shape[1]
        np.testing.assert_array_equal(
            theirs.scales.astype(np.float32), np.repeat(ours.scales, repeat, 1).astype(np.float32)
        )
        np.testing.assert_array_equal(whole(found), whole(original))
    assert ("bytes more" in kinds["layers/0/self_attn/q_proj/weight"].note) == (
        rule.weight_qtype in ("int2", "ternary")
    )


def test_half_integer_levels_are_q2_k_with_another_minimum(tmp_path):
    rule = Rule(module_path=".*down_proj", weight_qtype="int2", levels="half")
    made = shipment(CONFIGS["12b"], rule, Rule(weight_qtype=None))
    path, kinds = written(made, tmp_path)
    weight = "layers/0/mlp/down_proj/weight"
    assert kinds[weight][1:3] == ("exact", "Q2_K")
    back = read_gguf(path).tensors[weight]
    assert back.grid is not None and back.grid.levels == "half"
    np.testing.assert_array_equal(whole(back), whole(made.tensors[weight]))


def test_half_integer_levels_elsewhere_are_refused_or_said_to_be_rescaled(tmp_path):
    rule = Rule(module_path=".*q_proj", weight_qtype="int2", levels="half")
    made = shipment(CONFIGS["12b"], rule, Rule(weight_qtype=None))
    with pytest.raises(ValueError, match="q_proj.*levels='full'.*allow_rescale"):
        write_gguf(made, tmp_path, ExportOptions())
    path, kinds = written(made, tmp_path, allow_rescale=True)
    weight = "layers/0/self_attn/q_proj/weight"
    assert kinds[weight][1:3] == ("rescaled", "Q4_0")
    np.testing.assert_array_equal(
        whole(read_gguf(path).tensors[weight]), whole(made.tensors[weight])
    )


def test_scales_beyond_half_precision_are_refused_or_said_to_be_rescaled(tmp_path):
    made = shipment(CONFIGS["12b"], Rule(weight_qtype="int4"))
    weight = "layers/0/self_attn/q_proj/weight"
    tensor = made.tensors[weight]
    piece = tensor.read(0, tensor.num_rows)
    odd = Piece(piece.codes, (piece.scales * np.float32(1 + 2**-20)).astype(np.float32))
    tensors = dict(made.tensors)
    tensors[weight] = dataclasses.replace(
        tensor, read=lambda a, b: Piece(*(part[a:b] for part in odd))
    )
    made = dataclasses.replace(made, tensors=tensors)
    with pytest.raises(ValueError, match="q_proj.*float16.*scale_dtype='float16'.*allow_rescale"):
        written(made, tmp_path)
    (tmp_path / "again").mkdir()
    path, kinds = written(made, tmp_path / "again", allow_rescale=True)
    assert kinds[weight].kind == "rescaled"
    back = read_gguf(path).tensors[weight].read(0, tensor.num_rows)
    np.testing.assert_array_equal(back.codes, odd.codes)
    np.testing.assert_allclose(back.scales[:, :1], odd.scales, rtol=2**-11)


def test_a_block_no_type_has_is_refused_with_the_field_to_set(tmp_path):
    made = shipment(CONFIGS["12b"], Rule(weight_qtype="int8", tile_size=16, scale_dtype="float16"))
    with pytest.raises(ValueError, match="scale per 16 weights.*tile_size=32"):
        write_gguf(made, tmp_path, ExportOptions())


def test_blocks_of_sixteen_go_into_q6_k_where_rows_allow(tmp_path):
    rule = Rule(module_path=".*down_proj", weight_qtype="int4", tile_size=16, scale_dtype="float16")
    made = shipment(CONFIGS["12b"], rule, Rule(weight_qtype=None))
    path, kinds = written(made, tmp_path)
    weight = "layers/0/mlp/down_proj/weight"
    assert kinds[weight][1:3] == ("exact", "Q6_K")
    back = read_gguf(path).tensors[weight]
    np.testing.assert_array_equal(back.read(0, 4).codes, made.tensors[weight].read(0, 4).codes)
    np.testing.assert_array_equal(back.read(0, 4).scales, made.tensors[weight].read(0, 4).scales)


WIDE = model_config("e2b_mini", embed_dim=256, mlp_dim=256, vocab_size=96, per_layer_dim=128)


@pytest.mark.parametrize("table", ["q4_0", "q8_0", "q6_k"])
def test_a_table_on_the_anchored_lattice_is_exact_in_every_block_type(tmp_path, table):
    made = shipment(WIDE, int4(tile_size=32))
    path, kinds = written(made, tmp_path, tables=table)
    back = read_gguf(path)
    for name in ("embed_tokens/weight", "embed_tokens_per_layer/weight"):
        assert kinds[name][1:3] == ("exact", table.upper())
        np.testing.assert_array_equal(whole(back.tensors[name]), whole(made.tensors[name]))
        assert back.tensors[name].grid == made.tensors[name].grid
        codes = back.tensors[name].read(0, 9).codes
        np.testing.assert_array_equal(codes, made.tensors[name].read(0, 9).codes)


@pytest.mark.parametrize(
    "lie", [dict(bits=5), dict(levels="half", bits=2), dict(block=16), dict(block=TENSOR),
            dict(bits=3), dict(block=0), dict(scale_dtype="bfloat16"), dict(block=7), "none", None]
)  # fmt: skip
def test_metadata_of_other_grids_than_the_tensors_have_are_refused(tmp_path, monkeypatch, lie):
    made = shipment(CONFIGS["12b"], int4(tile_size=32))
    rng = np.random.default_rng(0)
    for name, tensor in made.tensors.items():  # scales of all the bits that float16 has
        if tensor.grid is not None:
            piece = tensor.read(0, tensor.num_rows)
            odd = Piece(piece.codes, rng.random(piece.scales.shape).astype(np.float16))
            read = lambda a, b, odd=odd: Piece(*(part[a:b] for part in odd))  # noqa: E731
            made.tensors[name] = dataclasses.replace(tensor, read=read)
    grids = {path: tensor.grid for path, tensor in made.tensors.items() if tensor.grid}
    fields = json.loads(grids_metadata(grids)[GRIDS_KEY])
    if isinstance(lie, dict):
        fields["grids"] = [grid | lie for grid in fields["grids"]]
    elif lie:
        fields["grids"] = []
    text = json.dumps(fields) if lie else "["
    monkeypatch.setattr("gemmaqat.interop.gguf_writer.grids_metadata", lambda _: {GRIDS_KEY: text})
    path, _ = written(made, tmp_path)
    with pytest.raises(ValueError, match="do not belong together|no grid|'gemmaqat.grids'"):
        for tensor in read_gguf(path).tensors.values():
            tensor.read(0, tensor.num_rows)


def test_a_file_without_the_metadata_is_read_as_the_grid_of_its_type(tmp_path, monkeypatch):
    monkeypatch.setattr("gemmaqat.interop.gguf_writer.grids_metadata", lambda _: {})
    made = shipment(CONFIGS["12b"], "q4_0")
    path, _ = written(made, tmp_path)
    back = read_gguf(path).tensors["layers/0/mlp/up_proj/weight"]
    assert back.grid == Grid(bits=4, block=32, scale_rule="ggml", scale_dtype="float16")


def test_tables_may_be_written_decoded(tmp_path):
    made = shipment(WIDE, int4(tile_size=32))
    path, kinds = written(made, tmp_path, tables="bf16")
    assert kinds["embed_tokens/weight"][1:3] == ("exact", "BF16")
    back = read_gguf(path).tensors["embed_tokens/weight"]
    np.testing.assert_array_equal(whole(back), whole(made.tensors["embed_tokens/weight"]))


@pytest.mark.parametrize("table", ["q4_0", "q8_0"])
def test_a_float_table_is_requantized_with_no_more_error_than_ggmls(tmp_path, table):
    made = shipment(WIDE, Rule(weight_qtype=None))
    path, kinds = written(made, tmp_path, tables=table)
    name = "embed_tokens/weight"
    assert kinds[name][1:3] == ("requantized", table.upper())
    original = whole(made.tensors[name])
    number = gguf.GGMLQuantizationType[table.upper()]
    theirs = gguf.dequantize(gguf.quantize(original, number), number)
    error = np.square(whole(read_gguf(path).tensors[name]) - original).sum()
    assert error <= np.square(theirs - original).sum()


def test_rows_no_multiple_of_256_fall_back_and_say_so_once(tmp_path, caplog):
    made = shipment(CONFIGS["e2b"], Rule(weight_qtype=None))
    with caplog.at_level("INFO"):
        _, kinds = written(made, tmp_path, tables="q6_k")
    assert kinds["embed_tokens/weight"].stored == "Q8_0"
    assert "no multiple of 256" in kinds["embed_tokens/weight"].note
    assert sum("no multiple of 256" in r.message for r in caplog.records) == 1


def test_a_table_whose_grid_does_not_fit_the_asked_type_is_refused(tmp_path):
    made = shipment(WIDE, Rule(weight_qtype="int8", scale_dtype="float16"))
    with pytest.raises(ValueError, match="embed_tokens/weight.*does not fit Q4_0"):
        write_gguf(made, tmp_path, ExportOptions(tables="q4_0"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", ""])
def test_the_model_projection_is_never_quantized(tmp_path, dtype):
    made = shipment(CONFIGS["e2b"], int4(tile_size=32))
    path, kinds = written(made, tmp_path, float_dtype=dtype)
    name = "per_layer_model_projection/weight"
    stored = {"float16": "F16", "bfloat16": "BF16"}.get(dtype, "F32")
    assert kinds[name][1:3] == ("exact", stored)
    np.testing.assert_array_equal(whole(read_gguf(path).tensors[name]), whole(made.tensors[name]))


def test_bfloat16_weights_stay_bfloat16_and_norms_are_float32(tmp_path):
    made = shipment(CONFIGS["12b"], "none", dtype=ml_dtypes.bfloat16)
    _, kinds = written(made, tmp_path)
    assert kinds["layers/0/mlp/up_proj/weight"].stored == "BF16"
    assert kinds["layers/0/input_layernorm/weight"].stored == "F32"


def test_values_beyond_half_precision_are_not_turned_into_infinity(tmp_path):
    made = shipment(CONFIGS["12b"], "none")
    huge = dataclasses.replace(
        made.tensors["embed_tokens/weight"], read=lambda a, b: np.full((b - a, 64), 1e6, np.float32)
    )
    made = dataclasses.replace(made, tensors={**made.tensors, huge.path: huge})
    with pytest.raises(ValueError, match="embed_tokens/weight.*65504.*bfloat16"):
        write_gguf(made, tmp_path, ExportOptions(float_dtype="float16"))


def test_activation_scales_are_left_out_and_the_file_says_so(tmp_path):
    made = shipment(CONFIGS["12b"], int4(tile_size=32))
    path = "layers/0/self_attn/q_proj/output/scale"
    clamp = ShippedTensor(
        path=path, shape=(), grid=None, dtype=np.dtype(np.float32),
        read=lambda a, b: np.ones((1, 1), np.float32),
    )  # fmt: skip
    made = dataclasses.replace(made, tensors={**made.tensors, path: clamp})
    file, kinds = written(made, tmp_path)
    assert path not in kinds
    assert "activation clamps" in kinds["layers/0/self_attn/q_proj/weight"].note
    assert "activation clamps" in gguf.GGUFReader(file).fields["gemmaqat.note"].contents()


def test_sharing_that_llama_cpp_does_otherwise_is_refused(tmp_path):
    after_sliding = model_config("e4b_mini", num_kv_shared_layers=2)
    with pytest.raises(ValueError, match="num_kv_shared_layers"):
        write_gguf(shipment(after_sliding, "none"), tmp_path, ExportOptions())


def test_what_is_opened_for_writing_need_be_no_file(tmp_path):
    class Kept(io.BytesIO):
        def close(self) -> None:
            self.whole = self.getvalue()
            super().close()

    made, sink = shipment(CONFIGS["e2b"], "q4_0_emb"), Kept()
    write_gguf(made, tmp_path, ExportOptions(), create=lambda _: sink)
    assert not list(tmp_path.iterdir())
    path, _ = written(made, tmp_path)
    assert sink.whole == path.read_bytes()


def test_rows_are_written_in_pieces(tmp_path, monkeypatch):
    few = functools.partial(pieces, num_bytes=1 << 12)
    monkeypatch.setattr("gemmaqat.interop.gguf_writer.pieces", few)
    made = shipment(CONFIGS["26b"], int4(tile_size=32))
    path, _ = written(made, tmp_path)
    weight = "layers/0/experts/gate_up_proj/weight"
    np.testing.assert_array_equal(
        whole(read_gguf(path).tensors[weight]), whole(made.tensors[weight])
    )
