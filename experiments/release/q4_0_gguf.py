r"""The Q4_0 GGUF for llama.cpp: linears in Q4_0, vocabulary tables in Q6_K as in Google's files.

Distilled from the instruction-tuned checkpoint, the tables on Q4_0's grid too: Q6_K holds it
exactly, as its scales have 5 bits. Sizes: e2b, e4b, 12b, 26b_a4b, 31b.

    gemmaqat train --config=experiments/release/q4_0_gguf.py --workdir=runs/e2b_q4_0_gguf
    gemmaqat export --config=experiments/release/q4_0_gguf.py \
        --checkpoint=runs/e2b_q4_0_gguf --workdir=shipped/e2b_q4_0_gguf

Another size: --config=experiments/release/q4_0_gguf.py:e4b
Smaller, with the tables in Q4_0: --tables=q4_0
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
    cfg.export.format = "gguf"
    cfg.export.options = dict(tables="q6_k")
    return cfg
