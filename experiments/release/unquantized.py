r"""The unquantized QAT checkpoint: bfloat16 safetensors whose values lie on Q4_0's grid.

Distilled from the instruction-tuned checkpoint. With the anchored 5-bit scales the stock converters
find every code in these values again, so this is the form to hand on. Sizes: e2b, e4b, 12b,
26b_a4b, 31b.

    gemmaqat train --config=experiments/release/unquantized.py --workdir=runs/e2b_unquantized
    gemmaqat export --config=experiments/release/unquantized.py \
        --checkpoint=runs/e2b_unquantized --workdir=shipped/e2b_unquantized

Another size: --config=experiments/release/unquantized.py:e4b
"""

from gemmaqat.config import base

SIZES = ("e2b", "e4b", "12b", "26b_a4b", "31b")


def get_config(size: str = "e2b"):
    if size not in SIZES:
        raise ValueError(f"{size!r} is not one of {SIZES}: no Gemma 4 is released in this size.")
    cfg = base(size)
    cfg.model.checkpoint = f"checkpoints/gemma-4-{size}-it"
    cfg.data.source = "files"
    cfg.data.files = (dict(path="corpus/*.jsonl"),)
    cfg.data.tokenizer = cfg.model.checkpoint
    cfg.quantization.recipe = "q4_0_emb"
    # Stays in 16 bits in the released files; llama.cpp refuses to quantize it.
    if size in ("e2b", "e4b"):
        cfg.quantization.rules = (dict(module_path="per_layer_model_projection"),)
    cfg.train.method = "distill"
    cfg.train.num_steps = 5_000
    cfg.train.accumulation_steps = 16
    cfg.optimizer.name = "adafactor"
    cfg.export.format = "hf"
    cfg.export.options = dict(float_dtype="bfloat16")
    return cfg
