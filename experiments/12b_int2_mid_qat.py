"""How close does 12B come at 2 bits, on the half-integer grid -1.5, -0.5, 0.5, 1.5?

A grid without a zero, one scale per channel; the tied embeddings in 8 bits. 2 bits need more
training than 4; the first hundred steps stay in float so that the optimizer's statistics settle.

Expected: not measured at this size; bits_ladder.py asks the same of a miniature.
Cost (estimate): 161 GB in one device's memory (training spans one device so far), 4.5 H100-hours
at 40 % of its peak.

    gemmaqat plan --config=experiments/12b_int2_mid_qat.py
    gemmaqat train --config=experiments/12b_int2_mid_qat.py --workdir=runs/12b_int2_mid

The deployed 2-bit codes instead: --config.quantization.recipe=int2_channel
"""

from gemmaqat.config import base


def get_config(size: str = "12b"):
    cfg = base(size)
    cfg.model.checkpoint = "checkpoints/gemma-4-12b"
    cfg.data.source = "files"
    cfg.data.files = (dict(path="corpus/*.jsonl"),)
    cfg.data.tokenizer = "checkpoints/gemma-4-12b"
    cfg.data.batch_size = 8
    cfg.quantization.recipe = "int2_mid_channel"
    cfg.quantization.rules = (dict(module_path="embed_tokens", weight_qtype="int8"),)
    cfg.train.method = "qat"
    cfg.train.num_steps = 4_000
    cfg.train.start_step = 100
    cfg.optimizer.name = "adafactor"
    cfg.optimizer.warmup_steps = 100
    return cfg
