"""Perplexity by position through the cache: that of the full pass, counted where tokens are."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.evaluation import context
from gemmaqat.evaluation.context import FLOAT, perplexity_by_position
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.activations import StaticQuantizer

LENGTHS = ((50, 14), (64,), (7, 30))  # documents of each packed row of 64


@pytest.fixture(scope="module")
def model():
    """One sliding and one full layer; the hooks of a static cache with a very coarse scale."""
    config = model_config(
        "12b_mini", layer_types=("sliding_attention", "full_attention"), sliding_window=8
    )
    model = Gemma4(config, rngs=nnx.Rngs(0))
    for block in model.layers:
        for name, scale in (("k", 0.3), ("v", 0.5)):
            setattr(block.self_attn, name, StaticQuantizer(jnp.float32(scale)))
    return model


@pytest.fixture(scope="module")
def batches():
    """Three packed rows, of which the third ends in padding, in batches of two."""
    rng = np.random.default_rng(0)
    rows = []
    for lengths in LENGTHS:
        pad = 64 - sum(lengths)
        segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        positions = np.concatenate([np.arange(n) for n in lengths])
        rows.append(
            dict(
                tokens=rng.integers(3, 128, 64).astype(np.int32),
                targets=rng.integers(3, 128, 64).astype(np.int32),
                loss_weights=np.pad(rng.choice([0.1, 1.0], 64 - pad), (0, pad)).astype(np.float32),
                segment_ids=np.pad(segments, (0, pad)).astype(np.int32),
                positions=np.pad(positions, (0, pad), constant_values=-1).astype(np.int32),
            )
        )
    empty = {name: np.zeros_like(field) for name, field in rows[0].items()}
    rows.append(empty | dict(positions=np.full(64, -1, np.int32)))
    return [{k: np.stack([r[k] for r in rows[i : i + 2]]) for k in rows[0]} for i in (0, 2)]


def by_full_pass(model, batches, *, hooks):
    """Sum of losses and number of counted tokens per document and position, without a cache."""
    graphdef, params = nnx.split(model)
    other = nnx.merge(graphdef, params)
    if not hooks:
        for block in other.layers:
            block.self_attn.k = block.self_attn.v = StaticQuantizer(jnp.float32(0))
    losses, counted = [], []
    for batch in batches:
        arrays = {k: jnp.asarray(v) for k, v in batch.items()}
        logits = other(arrays["tokens"], arrays["positions"], arrays["segment_ids"]).logits
        logits = np.asarray(logits, np.float64)
        loss = (
            np.log(np.exp(logits).sum(-1))
            - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        )
        for row in range(2):
            for segment in set(batch["segment_ids"][row]) - {0}:
                at = batch["segment_ids"][row] == segment
                weight = batch["loss_weights"][row, at] >= 1
                losses.append(np.pad(loss[row, at] * weight, (0, 64 - at.sum())))
                counted.append(np.pad(weight, (0, 64 - at.sum())))
    return np.stack(losses), np.stack(counted)


@pytest.mark.parametrize("kv_cache, hooks", [(None, False), ("static", True)], ids=str)
@pytest.mark.parametrize("chunk", [16, 64])
def test_losses_through_the_cache_are_those_of_the_full_pass(
    model, batches, kv_cache, hooks, chunk
):
    found = perplexity_by_position(model, batches, kv_cache=kv_cache, chunk=chunk)
    losses, counted = by_full_pass(model, batches, hooks=hooks)
    assert found.edges == (0, 16, 32, 64)
    for bucket, (a, b) in enumerate([(0, 16), (16, 32), (32, 64)]):
        np.testing.assert_array_equal(found.tokens[:, bucket], counted[:, a:b].sum(1))
        wanted = losses[:, a:b].sum(1)
        np.testing.assert_allclose(found.nll[:, bucket], wanted, rtol=1e-5, atol=1e-4)
    total = np.exp(losses[:, 16:32].sum() / counted[:, 16:32].sum())
    assert found.perplexity[1] == pytest.approx(total, rel=1e-5)


def test_kinds_differ_only_by_how_they_store(model, batches):
    """Coarse static scales show; eight dynamic bits hardly do; all count the same tokens."""
    kinds = {FLOAT: None, "static": "static", "int8": "int8", "int4": "int4"}
    scores = {
        name: perplexity_by_position(model, batches, kv_cache=kind) for name, kind in kinds.items()
    }
    base = scores[FLOAT]
    gap = {name: np.abs(found.nll - base.nll).max() for name, found in scores.items()}
    assert 0 < gap["int8"] < 0.2 * gap["int4"] and gap["int4"] < gap["static"]
    for found in scores.values():
        np.testing.assert_array_equal(found.tokens, base.tokens)
    sizes = [scores[name].kv_bytes for name in (FLOAT, "int8", "static", "int4")]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0] / 3.9

    lines = context.render(scores, samples=100).splitlines()
    assert len(lines) == 2 + 3 + 1 and all(line.count("|") == 7 for line in lines)
    assert lines[2].startswith("| 0-15 |") and f"{base.perplexity[0]:.4f}" in lines[2]
    assert f"| {base.kv_bytes:,} |" in lines[-1]


def test_scores_are_read_back_as_written(model, batches, tmp_path):
    scores = {FLOAT: perplexity_by_position(model, batches)}
    context.save(tmp_path, scores)
    back = context.load(tmp_path)[FLOAT]
    assert (back.edges, back.kv_bytes) == (scores[FLOAT].edges, scores[FLOAT].kv_bytes)
    np.testing.assert_array_equal(back.nll, scores[FLOAT].nll)
    with pytest.raises(FileNotFoundError, match=r"kv_caches set"):
        context.load(tmp_path / "other")


def test_a_hold_out_without_counted_tokens_is_refused(model, batches):
    silent = [batch | dict(loss_weights=np.zeros((2, 64), np.float32)) for batch in batches]
    with pytest.raises(ValueError, match="no document"):
        perplexity_by_position(model, silent)
