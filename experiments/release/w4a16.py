r"""W4A16 in compressed-tensors for vLLM: 4-bit linears in groups of 32, tables in bfloat16.

Distilled from the instruction-tuned checkpoint. Sizes: e2b, e4b, 12b, 31b. There was none of
26b_a4b at launch, and no reader is known to load its experts packed; `26b_a4b_w4a16_distill.py`
one folder up trains it all the same.

    gemmaqat train --config=experiments/release/w4a16.py --workdir=runs/e2b_w4a16
    gemmaqat export --config=experiments/release/w4a16.py \
        --checkpoint=runs/e2b_w4a16 --workdir=shipped/e2b_w4a16

Another size: --config=experiments/release/w4a16.py:e4b
"""

from gemmaqat.config import base

SIZES = ("e2b", "e4b", "12b", "31b")


def get_config(size: str = "e2b"):
    if size not in SIZES:
        raise ValueError(f"{size!r} is not one of {SIZES}: no reader loads packed experts.")
    cfg = base(size)
    cfg.model.checkpoint = f"checkpoints/gemma-4-{size}-it"
    cfg.data.source = "files"
    cfg.data.files = (dict(path="corpus/*.jsonl"),)
    cfg.data.tokenizer = cfg.model.checkpoint
    cfg.quantization.recipe = "w4a16_g32"
    # Stays in 16 bits in the released files; llama.cpp refuses to quantize it.
    if size in ("e2b", "e4b"):
        cfg.quantization.rules = (dict(module_path="per_layer_model_projection"),)
    cfg.train.method = "distill"
    cfg.train.num_steps = 5_000
    cfg.train.accumulation_steps = 16
    cfg.optimizer.name = "adafactor"
    cfg.export.format = "compressed-tensors"
    cfg.export.options = dict(float_dtype="bfloat16")
    return cfg
