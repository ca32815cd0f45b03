"""Runs google-deepmind/gemma on a checkpoint; a program for an interpreter that has the library.

    python gemma_library.py logits FOLDER CONFIG.json TOKENS.npy OUT.npy
    python gemma_library.py make FOLDER CONFIG.json TOKENS.npy OUT.npy

`logits` loads the folder with the library's own loader; `make` initialises the library's module at
random, moves every parameter off its initial value, and saves it there first. Both write the
module's float32 logits.
"""

import functools
import json
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from gemma import gm
from gemma.gm.nn.gemma4 import _config, _modules, _transformer


def main(mode: str, folder: str, config: str, tokens: str, out: str) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    with open(config) as file:
        fields = json.load(file)
    model = _transformer.Transformer(config=_library_config(fields), dtype=jnp.float32)
    ids = jnp.asarray(np.load(tokens), jnp.int32)
    if mode == "make":
        params = model.init(jax.random.key(0), ids)["params"]
        move = functools.partial(_moved, moe=fields["num_experts"] > 0)
        params = jax.tree_util.tree_map_with_path(move, params)
        gm.ckpts.save_params(params, folder, wait_until_finished=True)
    else:
        params = gm.ckpts.load_params(folder)
        wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), ids)["params"])
        found, expected = _shapes(params), _shapes(wanted)
        assert found == expected, f"tree differs: {sorted(found.items() ^ expected.items())}"
    np.save(out, np.asarray(model.apply({"params": params}, ids).logits, np.float32))


def _moved(path, x: jax.Array, *, moe: bool) -> jax.Array:
    """Off its initial value, but for the experts' input norm: the test tells why."""
    name = jax.tree_util.keystr(path)
    if moe and "'pre_ffw_norm'" in name:
        return jnp.full(x.shape, 1.25)
    key = jax.random.key(zlib.crc32(name.encode()))
    return x + 0.1 * jax.random.normal(key, x.shape)


def _shapes(tree) -> dict:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): tuple(x.shape) for path, x in flat}


def _library_config(c: dict) -> _config.TransformerConfig:
    """The library's configuration of our model, from its fields."""
    kind = {
        "sliding_attention": _modules.AttentionType.LOCAL_SLIDING,
        "full_attention": _modules.AttentionType.GLOBAL,
    }
    layers, shared = len(c["layer_types"]), c["num_kv_shared_layers"]
    sharing = _config.KVCacheSharingConfig(
        frac_shared_layers=shared / layers, share_global=True, share_local=True
    )
    return _config.TransformerConfig(
        num_embed=c["vocab_size"],
        embed_dim=c["embed_dim"],
        hidden_dim=c["mlp_dim"],
        num_heads=c["num_heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["num_kv_heads"],
        num_global_kv_heads=c["num_global_kv_heads"] if c["attention_k_eq_v"] else None,
        global_key_size=c["global_head_dim"],
        final_logit_softcap=c["final_logit_softcap"],
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=tuple(kind[t] for t in c["layer_types"]),
        k_eq_v_global=c["attention_k_eq_v"],
        global_rope_proportion=c["partial_rotary_factor"],
        local_rope_proportion=1.0,
        sliding_window_size=c["sliding_window"],
        local_base_frequency=int(c["local_rope_theta"]),
        global_base_frequency=int(c["global_rope_theta"]),
        per_layer_input_dim=c["per_layer_dim"],
        kv_cache_sharing_config=sharing if shared else None,
        override_kv_shared_ffw_hidden=2 * c["mlp_dim"] if c["use_double_wide_mlp"] else None,
        enable_moe=c["num_experts"] > 0,
        num_experts=c["num_experts"],
        expert_dim=c["expert_dim"],
        top_k_experts=c["num_experts_per_token"],
        moe_dense_hidden_dim=c["mlp_dim"],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
