r"""The mobile scheme (wNa8o8) as transformers loads it: 2, 4 and 8 bits, static activations.

Distilled from the instruction-tuned checkpoint with the clamps of the activations in place; they
are part of the model. transformers (5.23) loads one scale per row of the per-layer table, so the
table gets one here; `mobile_ct.py` gives it one per row and layer. Sizes: e2b, e4b.

    gemmaqat train --config=experiments/release/mobile_transformers.py \
        --workdir=runs/e2b_mobile_transformers
    gemmaqat export --config=experiments/release/mobile_transformers.py \
        --checkpoint=runs/e2b_mobile_transformers --workdir=shipped/e2b_mobile_transformers

Another size: --config=experiments/release/mobile_transformers.py:e4b
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
    qtype = "int4" if size == "e2b" else "int2"
    cfg.quantization.rules = (
        dict(module_path="embed_tokens_per_layer", weight_qtype=qtype, scale_rule="mse"),
    )
    cfg.train.method = "distill"
    cfg.train.num_steps = 5_000
    cfg.train.accumulation_steps = 16
    cfg.optimizer.name = "adafactor"
    cfg.export.format = "gemma-mobile"
    return cfg
