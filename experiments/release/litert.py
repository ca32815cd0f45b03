r"""The mobile scheme (wNa8o8) for phones: a LiteRT model with prefill and decode signatures.

Distilled from the instruction-tuned checkpoint with the clamps of the activations in place; they
are part of the model. Sizes: e2b, e4b (the released 12B bundle is not quantization-aware). The
export needs the extra `litert`.

    gemmaqat train --config=experiments/release/litert.py --workdir=runs/e2b_litert
    gemmaqat export --config=experiments/release/litert.py \
        --checkpoint=runs/e2b_litert --workdir=shipped/e2b_litert

Another size: --config=experiments/release/litert.py:e4b
"""

from gemmaqat.config import base

SIZES = ("e2b", "e4b")


def get_config(size: str = "e2b"):
    if size not in SIZES:
        raise ValueError(
            f"{size!r} is not one of {SIZES}: the mobile scheme is defined for the E sizes alone."
        )
    cfg = base(size)
    cfg.model.checkpoint = f"checkpoints/gemma-4-{size}-it"
    cfg.data.source = "files"
    cfg.data.files = (dict(path="corpus/*.jsonl"),)
    cfg.data.tokenizer = cfg.model.checkpoint
    cfg.quantization.recipe = f"mobile_{size}"
    cfg.train.method = "distill"
    cfg.train.num_steps = 5_000
    cfg.train.accumulation_steps = 16
    cfg.optimizer.name = "adafactor"
    cfg.export.format = "litert"
    cfg.export.options = dict(cache_length=4_096)
    return cfg
