"""At 2 bits, is it the attention or the MLPs that break E2B?

2 bits for the MLPs alone, those of the first two blocks excepted: rules are tried before the
recipe, and the first that matches wins. `gemmaqat inspect` prints what each parameter gets; run it
first.

Expected: not measured at this size.
Cost (estimate): 100 GB (one 141 GB accelerator), 0.6 H100-hours at 40 % of its peak.

    gemmaqat inspect --config=experiments/e2b_int8_attention.py
    gemmaqat train --config=experiments/e2b_int8_attention.py --workdir=runs/e2b_int8_attention

Attention in 4 bits, too: --config.quantization.rules[1].weight_qtype=int4
"""

from gemmaqat.config import base


def get_config(size: str = "e2b"):
    cfg = base(size)
    cfg.model.checkpoint = "checkpoints/gemma-4-e2b"
    cfg.data.source = "files"
    cfg.data.files = (dict(path="corpus/*.jsonl"),)
    cfg.data.tokenizer = "checkpoints/gemma-4-e2b"
    cfg.quantization.recipe = "int2_channel"
    cfg.quantization.rules = (
        dict(module_path=r"embed_tokens.*", weight_qtype="int4", tile_size=32),
        dict(module_path=r"layers/\d+/self_attn/.*", weight_qtype="int8"),
        dict(module_path=r"(.*/)?per_layer_.*", weight_qtype="int8"),
        dict(module_path=r"layers/[01]/mlp/.*", weight_qtype=None),
    )
    cfg.train.method = "distill"
    cfg.train.num_steps = 1_000
    cfg.train.accumulation_steps = 16
    cfg.optimizer.name = "adafactor"
    return cfg
