r"""Can E4B's 4-bit weights in groups of 32 (w4a16) be pulled back onto the float model itself?

Distillation asks for the float model's probabilities instead of the text's next token, so the
result is judged by KL to the original, not by what it learned from the text.

Expected: not measured at this size; bits_ladder.py asks the same of a miniature.
Cost (estimate): 157 GB (one 180 GB accelerator), 1.1 H100-hours at 40 % of its peak.

    gemmaqat train --config=experiments/e4b_w4a16_distill.py --workdir=runs/e4b_w4a16 \
        --config.model.checkpoint=checkpoints/gemma-4-e4b

Fewer tokens first: --config.train.num_steps=100
"""

from gemmaqat.config import base


def get_config(size: str = "e4b"):
    cfg = base(size)
    cfg.model.checkpoint = "checkpoints/gemma-4-e4b"
    cfg.data.source = "files"
    cfg.data.files = (dict(path="corpus/*.jsonl"),)
    cfg.data.tokenizer = "checkpoints/gemma-4-e4b"
    cfg.quantization.recipe = "w4a16_g32_emb"
    cfg.train.method = "distill"
    cfg.train.num_steps = 1_000
    cfg.train.accumulation_steps = 16
    cfg.optimizer.name = "adafactor"
    return cfg
