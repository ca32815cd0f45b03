"""What does a key/value cache of 8 or 4 bits cost, near and far from the start of a text?

Trains a miniature in float on Python source in rows of 512 tokens, then reads the hold-out through
the real cache of each kind, chunk by chunk, and prints the perplexity by position.

- static: int8, one calibrated scale for the keys and one for the values of a layer
- int8, int4: one scale per token and head

Weights stay float (recipe "none" with a rule for keys and values alone), so that what is seen is
the cache. Results: experiments/README.md.
Cost: 25 minutes on two CPU cores shared with other work.

    gemmaqat train --config=experiments/kv_cache.py --workdir=runs/kv_cache
    gemmaqat evaluate --workdir=runs/kv_cache

With the weights in 4 bits: --config.quantization.recipe=int4_channel
"""

from gemmaqat.config import base


def get_config(size: str = "e2b_mini"):
    cfg = base(size)
    cfg.data.source = "stdlib"
    cfg.data.tokenizer = "bpe"
    cfg.data.prompt_weight = 1.0  # text has no prompts
    cfg.data.sequence_length = 512
    cfg.data.batch_size = 4
    cfg.train.method = "none"
    cfg.train.num_steps = 700
    cfg.train.eval_sequences = 0  # `evaluate` judges
    cfg.optimizer.learning_rate = 6e-3
    cfg.quantization.recipe = "none"
    cfg.quantization.rules = (
        dict(
            module_path=r"layers/\d+/self_attn",
            kv_qtype="int8",
            act_static_scale=True,
            act_calibration_method="absmax",
            value_scale=6 / 127,
        ),
    )
    cfg.evaluation.num_sequences = 128
    cfg.evaluation.batch_size = 8
    cfg.evaluation.items_per_task = 0
    cfg.evaluation.kv_caches = ("static", "int8", "int4")
    return cfg
