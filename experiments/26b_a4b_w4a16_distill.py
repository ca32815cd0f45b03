"""Do 128 experts survive 4 bits when each sees only a sixteenth of the tokens?

Distillation from the float model; experts are quantized like every other matrix, the router stays
in int8 so that its decisions move little.

Expected: not measured at this size.
Cost (estimate): 433 GB. Training spans one device so far, so this size waits for sharded training
or for a machine with as much memory; 1 H100-hour's worth of operations at 40 % of its peak.

    gemmaqat plan --config=experiments/26b_a4b_w4a16_distill.py
    gemmaqat train --config=experiments/26b_a4b_w4a16_distill.py --workdir=runs/26b_a4b_w4a16

The same question today, in miniature:
    gemmaqat compare --config=experiments/quickstart.py:26b_a4b_mini --workdir=runs/experts
"""

from gemmaqat.config import base


def get_config(size: str = "26b_a4b"):
    cfg = base(size)
    cfg.model.checkpoint = "checkpoints/gemma-4-26b-a4b"
    cfg.data.source = "files"
    cfg.data.files = (dict(path="corpus/*.jsonl"),)
    cfg.data.tokenizer = "checkpoints/gemma-4-26b-a4b"
    cfg.quantization.recipe = "w4a16_g32_emb"
    cfg.quantization.rules = (dict(module_path=r"layers/\d+/router/.*", weight_qtype="int8"),)
    cfg.train.method = "distill"
    cfg.train.num_steps = 1_000
    cfg.optimizer.name = "adafactor"
    return cfg
