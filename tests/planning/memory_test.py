"""Memory plans: exact where they say so, and moving the right way where they estimate."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from gemmaqat.config import Experiment, OptimizerConfig, TrainConfig, base, parse
from gemmaqat.models.sizes import model_config
from gemmaqat.planning import memory
from gemmaqat.planning.devices import format_bytes, free_bytes
from gemmaqat.planning.parameters import abstract_parameters
from gemmaqat.training.optimizer import make_optimizer


def items(experiment: Experiment, config) -> dict[str, int]:
    return {item.name: item.bytes for item in memory.training_memory(experiment, config).items}


@pytest.mark.parametrize("name", ["adamw", "adam", "adafactor", "sgd"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_optimizer_bytes_are_those_of_optax(name, state_dtype):
    config = model_config("26b_a4b_mini")
    optimizer = OptimizerConfig(name=name, state_dtype=state_dtype)
    experiment = Experiment(optimizer=optimizer)
    shapes = abstract_parameters(config)
    state = jax.eval_shape(make_optimizer(optimizer).init, shapes)
    real = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    planned = items(experiment, config)["optimizer state"]
    # Counters and adafactor's empty placeholders are a few bytes per parameter.
    assert 0 <= real - planned <= 16 * len(shapes)


@pytest.mark.parametrize(
    "name, full_window, per_position",  # bf16: bytes of full windows, bytes per global position
    [
        ("e2b", 6_291_456, 6_144),
        ("e4b", 20_971_520, 16_384),
        ("12b", 335_544_320, 16_384),
        ("26b_a4b", 209_715_200, 20_480),
        ("31b", 838_860_800, 81_920),
    ],
)
def test_cache_bytes_follow_the_formula(name, full_window, per_position):
    config = model_config(name, dtype="bfloat16")
    length = 5_000
    owned = [layer for layer in range(config.num_layers) if config.owns_kv(layer)]
    slots = sum(config.sliding_window if config.is_sliding(i) else length for i in owned)
    expected = full_window + per_position * length + 4 * slots  # positions are int32
    assert memory.cache_bytes(config, batch_size=1, length=length) == expected
    assert memory.cache_bytes(config, batch_size=3, length=length) == 3 * expected


@pytest.mark.parametrize("name", ["e2b", "31b"])
def test_codes_take_their_bits_and_four_bytes_of_scale_per_token_and_head(name):
    """In bf16 a vector of keys or values takes 2 H bytes, with positions (4 a slot) beside it."""
    config = model_config(name, dtype="bfloat16")
    length, plain, wanted = 5_000, 0, dict.fromkeys(("static", "int8", "int4"), 0)
    for layer in range(config.num_layers):
        if config.owns_kv(layer):
            slots = config.sliding_window if config.is_sliding(layer) else length
            vectors, head = 2 * slots * config.layer_kv_heads(layer), config.layer_head_dim(layer)
            plain += vectors * 2 * head + 4 * slots
            wanted["static"] += vectors * head + 4 * slots + 8
            wanted["int8"] += vectors * (head + 4) + 4 * slots
            wanted["int4"] += vectors * (head // 2 + 4) + 4 * slots
    assert memory.cache_bytes(config, batch_size=1, length=length) == plain
    for kv_cache, nbytes in wanted.items():
        found = memory.cache_bytes(config, batch_size=1, length=length, kv_cache=kv_cache)
        assert found == nbytes, kv_cache
    plan = memory.generation_memory(config, batch_size=1, length=length, kv_cache="int4")
    cache = {item.name: item for item in plan.items}["key/value cache"]
    assert cache.bytes == wanted["int4"] and cache.note.endswith("int4")


def test_methods_and_settings_move_the_plan_the_right_way():
    experiment = parse(base("e2b"))
    config = model_config("e2b", dtype="bfloat16", remat="full")
    plain = items(dataclasses.replace(experiment, train=TrainConfig(method="none")), config)
    qat = items(dataclasses.replace(experiment, train=TrainConfig(method="qat")), config)
    distill = items(dataclasses.replace(experiment, train=TrainConfig(method="distill")), config)
    assert plain.keys() < qat.keys() < distill.keys()
    assert distill["teacher"] == plain["parameters"] == 4 * 4_628_569_379
    kept = memory.activation_bytes(dataclasses.replace(config, remat="none"), rows=4, length=512)
    dots = memory.activation_bytes(dataclasses.replace(config, remat="dots"), rows=4, length=512)
    full = memory.activation_bytes(config, rows=4, length=512)
    assert full < dots < kept
    chunked = TrainConfig(method="none", loss_chunk_tokens=256)
    chunked = items(dataclasses.replace(experiment, train=chunked), config)
    assert chunked["logits"] == 3 * 256 * 262_144 * 4 < plain["logits"]


def test_packed_weights_count_as_what_they_occupy():
    config = model_config("e2b_mini")
    plan = memory.generation_memory(config, batch_size=2, length=64, weight_bytes=1234)
    assert {item.name: item.bytes for item in plan.items}["parameters"] == 1234
    assert plan.total == sum(item.bytes for item in plan.items)
    assert "1.21 KiB" in plan.render()


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1.5 * 2**30, "1.5 GiB"),
     (2**40, "1 TiB"), (5000 * 2**40, "5e+03 TiB")],
)  # fmt: skip
def test_bytes_read_well(count, text):
    assert format_bytes(count) == text


def test_free_memory_of_the_host_shrinks_when_it_is_taken():
    before = free_bytes()
    assert before is not None and before > 2**28
    block = jnp.ones(2**26, jnp.float32).block_until_ready()  # 256 MiB
    # Other processes come and go: half of it must show.
    assert before - free_bytes() > 2**27
    del block
