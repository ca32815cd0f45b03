"""The size oracle against every published size, each with its tolerance and convention."""

import json
import math

import jax
import pytest

from gemmaqat.main import main
from gemmaqat.models.cache import init_cache
from gemmaqat.models.sizes import model_config
from gemmaqat.planning.devices import parse_bytes
from gemmaqat.planning.layouts import FULL_SIZES, LAYOUTS, available
from gemmaqat.planning.parameters import abstract_model, count_parameters
from gemmaqat.planning.size import FAMILIES, fit, kv_bytes, measure, survey, tensors, traffic
from gemmaqat.planning.size_report import draw_fits, render, render_fits
from gemmaqat.quantization.rules import resolve

GB, GIB = 1e9, 2.0**30

# size, format, published figure, its unit, tolerance in that unit. The documentation's table
# prints GiB as GB and one digit; files are decimal, llama.cpp's "model size" GiB without metadata.
DOCUMENTED = [
    ("e2b", "bf16", 11.4, 0.06),
    ("e4b", "bf16", 17.9, 0.06),
    ("12b", "bf16", 26.7, 0.1),
    ("26b_a4b", "bf16", 57.7, 0.1),
    ("31b", "bf16", 69.9, 0.1),
    ("e2b", "sfp8", 5.7, 0.06),
    ("e4b", "sfp8", 8.9, 0.06),
    ("12b", "sfp8", 13.4, 0.06),
    ("26b_a4b", "sfp8", 28.8, 0.06),
    ("31b", "sfp8", 34.9, 0.06),
    ("e2b", "q4_0", 2.9, 0.06),
    ("e4b", "q4_0", 4.5, 0.06),
    ("12b", "q4_0", 6.7, 0.06),
    ("26b_a4b", "q4_0", 14.4, 0.06),
    ("31b", "q4_0", 17.5, 0.06),
    ("e2b", "mobile", 1.1, 0.05),  # to the printed digit
    ("e4b", "mobile", 2.5, 0.05),
    ("e2b", "mobile-text", 0.84, 0.005),
    ("e4b", "mobile-text", 2.2, 0.05),
]
FILES = [
    # Google's GGUF files: 0.01 %, or the printed digits
    ("e2b", "q4_0-gguf", 3.35, 0.005),
    ("e4b", "q4_0-gguf", 5.154_939_136, 5.15e-4),
    ("12b", "q4_0-gguf", 6.98, 0.005),
    ("26b_a4b", "q4_0-gguf", 14.439_361_440, 1.44e-3),
    ("31b", "q4_0-gguf", 17.651_001_568, 1.76e-3),
    # all-Q4_0 re-conversions: 0.5 %
    ("e2b", "q4_0-gguf-all", 2.62, 0.013),
    ("e4b", "q4_0-gguf-all", 4.22, 0.021),
    ("12b", "q4_0-gguf-all", 6.72, 0.034),
    ("26b_a4b", "q4_0-gguf-all", 14.2, 0.071),
    ("31b", "q4_0-gguf-all", 17.3, 0.087),
    # bfloat16 GGUF: the printed digits
    ("e2b", "bf16-gguf", 9.31, 0.005),
    ("e4b", "bf16-gguf", 15.1, 0.05),
    ("12b", "bf16-gguf", 23.8, 0.05),
    ("26b_a4b", "bf16-gguf", 50.5, 0.05),
    ("31b", "bf16-gguf", 61.4, 0.05),
    # compressed-tensors: 1 %
    ("e2b", "w4a16", 8.32, 0.083),
    # safetensors: the published payloads plus a header of some 100 kB
    ("e2b", "hf", 10.2, 0.05),
    ("e2b", "hf", 10.246_357_958, 3e-4),
    ("e4b", "hf", 15.992_314_836, 3e-4),
    ("12b", "hf", 23.919_549_408, 3e-4),
    ("26b_a4b", "hf", 51.611_872_412, 3e-4),
    ("31b", "hf", 62.546_177_752, 3e-4),
    # mobile artefacts, published as "about"; their encoders are an estimate: 2 %, and 7 % for the
    # bundle, whose parts are not published
    ("e4b", "gemma-mobile", 3.56, 0.07),
    ("e2b", "litert", 2.6, 0.18),
]
# llama.cpp's own figure: tensors alone, GiB.
MODEL_SIZES = [
    ("e4b", "q4_0-gguf", 4.79),
    ("e4b", "q4_0-gguf-tables", 3.95),
    ("31b", "q4_0-gguf-tables", 16.09),
    ("e4b", "bf16-gguf-used", 13.90),
]
# What the formulas of the published conventions give, closer than the published digits.
DERIVED = [
    ("e2b", "mobile-text", 0.836, 0.002),
    ("e4b", "mobile-text", 2.235, 0.002),
    ("e2b", "mobile", 1.113, 0.002),
    ("e4b", "mobile", 2.512, 0.002),
]


@pytest.mark.parametrize("size, format, published, tolerance", DOCUMENTED)
def test_the_documentation_table_is_reproduced(size, format, published, tolerance):
    assert measure(size, format).bytes / GIB == pytest.approx(published, abs=tolerance)


@pytest.mark.parametrize("size, format, published, tolerance", FILES)
def test_published_files_have_the_size_computed(size, format, published, tolerance):
    assert measure(size, format).bytes / GB == pytest.approx(published, abs=tolerance)


@pytest.mark.parametrize("size, format, published", MODEL_SIZES)
def test_tensors_alone_have_the_size_llama_cpp_prints(size, format, published):
    measured = measure(size, format)
    alone = measured.bytes - measured.families["metadata"]
    assert alone / GIB == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize("size, format, expected, tolerance", DERIVED)
def test_mobile_columns_follow_their_formula(size, format, expected, tolerance):
    assert measure(size, format).bytes / GIB == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    "size, bytes_of_tensors",
    [
        ("e2b", 3_333_697_676),
        ("e4b", 5_139_115_176),
        ("12b", 6_960_053_440),
        ("26b_a4b", 14_423_537_784),
        ("31b", 17_635_165_424),
    ],
)
def test_tensors_of_googles_gguf_files_are_counted_to_the_byte(size, bytes_of_tensors):
    measured = measure(size, "q4_0-gguf")
    # The published count takes layer scalars and one rope table differently: a kilobyte or two.
    assert abs(measured.bytes - measured.families["metadata"] - bytes_of_tensors) < 2_048


def test_the_mobile_per_layer_table_is_the_published_one():
    tables = {
        size: [item for item in measure(size, "gemma-mobile").stored if "per_layer_t" in item.kind]
        for size in ("e2b", "e4b")
    }
    (e2b,), (e4b,) = tables["e2b"], tables["e4b"]
    assert (e2b.code_bytes, e4b.code_bytes) == (1_174_405_120, 704_643_072)
    assert e2b.scale_bytes / 1e6 == pytest.approx(36.7, abs=0.05)
    assert e4b.scale_bytes / 1e6 == pytest.approx(44, abs=0.05)


COUNTS = {  # weights by kind of the text decoder; k/v of sharing layers apart
    "e2b": dict(
        attention=278_396_928, mlp=1_557_135_360, embedding=402_653_184,
        per_layer_table=2_348_810_240, per_layer_linear=27_525_120,
        per_layer_projection=13_762_560, unused_kv=18_874_368,
    ),
    "e4b": dict(
        attention=587_202_560, mlp=3_303_014_400, embedding=671_088_640,
        per_layer_table=2_818_572_288, per_layer_linear=55_050_240,
        per_layer_projection=27_525_120, unused_kv=55_050_240,
    ),
    "12b": dict(
        attention=2_406_481_920, mlp=8_493_465_600, embedding=1_006_632_960, vector=769_840,
    ),
    "26b_a4b": dict(
        attention=1_110_179_840, mlp=535_265_280, experts=22_837_985_280, embedding=738_197_504,
    ),
    "31b": dict(
        attention=8_477_736_960, mlp=20_808_990_720, embedding=1_409_286_144, vector=1_331_516,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", FULL_SIZES)
def test_every_kind_has_the_published_number_of_weights(size):
    counts: dict[str, int] = {}
    for kind, rows, length in tensors(model_config(size)):
        kind = "mlp" if kind == "shared_mlp" else kind
        counts[kind] = counts.get(kind, 0) + rows * length
    assert COUNTS[size].items() <= counts.items()
    ours = sum(
        n for kind, n in counts.items() if kind not in ("head", "unused_kv", "unused_vector")
    )
    assert ours == count_parameters(model_config(size))


# bytes per position of full-attention layers, and of full windows, in bfloat16
CACHES = {
    "e2b": (6_144, 6_291_456),
    "e4b": (16_384, 20_971_520),
    "12b": (16_384, 335_544_320),
    "26b_a4b": (20_480, 209_715_200),
    "31b": (81_920, 838_860_800),
}


@pytest.mark.parametrize("size", FULL_SIZES)
def test_the_cache_is_its_windows_and_what_full_attention_keeps(size):
    config = model_config(size)
    per_position, windows = CACHES[size]
    for context in (2_048, 131_072):
        assert kv_bytes(config, context) == windows + per_position * context
    # the mobile scheme: one byte a number, two float32 scalars per layer that owns keys
    owners = config.first_shared_layer
    assert kv_bytes(config, 2_048, "static") == (windows + per_position * 2_048) // 2 + 8 * owners


@pytest.mark.parametrize("kv_cache", ["f32", "int8", "int4"])
@pytest.mark.parametrize("context", [20, 100])
def test_the_cache_is_the_one_that_generation_allocates(kv_cache, context):
    config = model_config("e4b_mini")
    quantization = None if kv_cache == "f32" else kv_cache
    cache = jax.eval_shape(
        lambda: init_cache(
            config, batch_size=1, max_length=context, dtype="float32", quantization=quantization
        )
    )
    kept = [(layer.k, layer.v) for layer in cache.layers if layer is not None]
    allocated = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(kept))
    assert kv_bytes(config, context, kv_cache) == allocated


@pytest.mark.parametrize("size", FULL_SIZES)
def test_families_add_up_and_every_figure_says_what_it_counts(size):
    for item in survey([size], contexts=(0, 1_024)):
        assert sum(item.families.values()) == item.bytes
        assert set(item.families) <= set(FAMILIES)
        assert item.weight_bytes + item.families.get("kv_cache", 0) == item.bytes
        assert ("kv_cache" in item.families) == (item.context > 0)
        assert len(item.convention) > 20 and item.convention in render([item])
        assert json.loads(json.dumps(item.to_json()))["bytes"] == item.bytes


def test_a_recipe_takes_the_bytes_of_its_table():
    for name in ("recipe:q4_0", "int2_channel_emb"):
        config = model_config("e2b", param_dtype="bfloat16")
        table = resolve(name.removeprefix("recipe:"), abstract_model(config))
        assert measure("e2b", name).bytes == table.num_bytes
    assert measure("e2b", "q4_0").unit == "GiB"  # the documentation's, not the recipe


def test_a_token_moves_its_active_experts_and_one_row_of_each_table():
    moe = measure("26b_a4b", "hf")
    experts = moe.families["experts"]
    rest = moe.families["linears"] + moe.families["norms"] + moe.families["embeddings"]
    row = 2 * 2_816
    assert traffic(moe, context=0).bytes == rest + experts * 8 // 128 + row

    small = measure("e2b", "gemma-mobile")
    moved = traffic(small, context=0)
    assert moved.storage == 35 * 256 // 2 + 35 * 4  # 4-bit codes and a scale per layer
    # the head is read, its copy for the embedding only in one row
    head = 262_144 * (1_536 // 4 + 4)
    kept = sum(
        item.code_bytes + item.scale_bytes
        for item in small.stored
        if item.kind not in ("per_layer_table", "embedding", "unused_kv", "unused_vector", "head")
    )
    assert moved.weights == kept + head + 1_536 // 4 + 4


def test_a_token_reads_the_window_of_every_layer_that_attends():
    size = measure("e2b", "hf")
    config = model_config("e2b")
    more = traffic(size, context=40_001).kv_cache - traffic(size, context=40_000).kv_cache
    full = sum(not config.is_sliding(i) for i in range(config.num_layers))
    assert more == full * 2 * 512 * 2  # windows are full; shared layers read their owner's keys


def test_what_fits_is_resident_without_the_per_layer_table():
    size = measure("e4b", "q4_0-gguf", context=8_192)
    enough = fit(size, memory=8 * GIB, bandwidth=60 * GB)
    table = 2_818_572_288 * 210 // 256
    assert enough.on_storage == table
    assert enough.resident == size.bytes - table - size.families["metadata"]
    assert enough.fits and enough.largest_context == 131_072
    assert enough.tokens_per_second == pytest.approx(60 * GB / enough.traffic.bytes)
    assert not fit(size, memory=enough.resident - 1).fits
    assert fit(size, memory=enough.resident).fits


def test_the_largest_context_is_the_last_that_fits():
    size = measure("12b", "q4_0-gguf")
    config = model_config("12b")
    longest = fit(size, memory=8 * GIB).largest_context
    weights = fit(size, memory=8 * GIB).resident
    assert weights + kv_bytes(config, longest, "f16") <= 8 * GIB
    assert weights + kv_bytes(config, longest + 1, "f16") > 8 * GIB
    assert fit(size, memory=1 * GIB).largest_context == 0


@pytest.mark.parametrize("memory", [1e6, 8 * GIB])
def test_fits_are_told_in_a_table_and_a_picture(memory, tmp_path):
    fits = [fit(item, memory=memory, bandwidth=6e10) for item in survey(["e2b"], contexts=(512,))]
    text = render_fits(fits, memory=memory)
    assert text.count("e2b") == len(fits) == len(available(model_config("e2b")))
    draw_fits(fits, memory=memory, bandwidth=6e10).savefig(tmp_path / "fits.png")
    assert (tmp_path / "fits.png").stat().st_size > 10_000


def test_formats_that_a_size_lacks_are_refused_by_name_and_left_out_of_surveys():
    with pytest.raises(ValueError, match="mobile scheme is defined for e2b and e4b alone"):
        measure("12b", "mobile")
    with pytest.raises(ValueError, match="no experts to pack"):
        measure("31b", "w4a16-packed-experts")
    assert {item.size for item in survey(formats=["mobile"])} == {"e2b", "e4b"}
    assert {item.format for item in survey()} == set(LAYOUTS)
    with pytest.raises(ValueError, match="did you mean 'q4_0-gguf'"):
        measure("e2b", "q4_0_gguf")
    with pytest.raises(ValueError, match="131,072 positions"):
        measure("e2b", "hf", context=200_000)
    with pytest.raises(ValueError, match="kv_cache='int5' is not one of"):
        measure("e2b", "hf", context=1, kv_cache="int5")


@pytest.mark.parametrize(
    "text, expected",
    [("8GiB", 8 * GIB), ("60GB/s", 6e10), ("60 GB", 6e10), ("1.5e9", 1.5e9), ("512MiB", GIB / 2)],
)
def test_amounts_are_read_with_their_unit(text, expected):
    assert parse_bytes(text, where="--memory") == expected


@pytest.mark.parametrize("text", ["", "8x", "GiB", "-1GB", "0", "1..2GB", "8 bytes"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match=r"^--memory="):
        parse_bytes(text, where="--memory")


def test_the_command_prints_the_figures_as_text_and_as_json(capsys):
    assert main(["gemmaqat", "size", "--size=e2b", "--format=q4_0-gguf,recipe:q4_0"]) == 0
    text = capsys.readouterr().out
    assert "3.35 GB" in text and "Q6_K as in Google's files" in text and "recipe q4_0" in text
    arguments = ["--size", "e2b", "--format", "q4_0-gguf", "--context", "4096", "--json"]
    assert main(["gemmaqat", "size", *arguments]) == 0
    (item,) = json.loads(capsys.readouterr().out)
    assert (item["size"], item["format"]) == ("e2b", "q4_0-gguf")
    assert item["bytes"] == sum(item["families"].values())
    assert item["families"]["kv_cache"] == 6_291_456 + 4_096 * 6_144


def test_the_command_answers_what_fits_and_draws_it(tmp_path, capsys):
    picture = tmp_path / "fits.png"
    arguments = ["--size=e2b,12b", "--memory", "8GiB", "--bandwidth", "60GB/s", "--json"]
    assert main(["gemmaqat", "size", *arguments, f"--plot={picture}"]) == 0
    items = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    by_name = {(i["size"], i["format"], i["context"]): i["fit"] for i in items}
    assert by_name["e2b", "gemma-mobile", 4_096]["fits"]
    assert not by_name["12b", "hf", 4_096]["fits"]
    fit = by_name["e2b", "q4_0-gguf", 32_768]
    assert fit["tokens_per_second_at_most"] == pytest.approx(60 * GB / fit["bytes_per_token"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size=e2x"], "did you mean 'e2b'?"),
        (["--format=q4"], "format 'q4' is unknown"),
        (["--memory=lots"], "--memory=lots: no amount"),
        (["--bandwidth=60GB/s"], "--memory: missing"),
        (["--context=-1"], "--context=-1: expected whole numbers"),
        (["--size=e2b", "--memory=8GiB", "--plot=/no/such/folder/a.png"], "/no/such/folder/a.png"),
    ],
)
def test_mistakes_end_the_command_with_one_line(arguments, message, capsys):
    assert main(["gemmaqat", "size", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
