"""Does the largest model need QAT at all for Q4_0?

Large models lose less to 4 bits, so measure before training: `plan` for the memory, then the
comparison's round-to-nearest arm, then QAT.

Expected: not measured at this size.
Cost (estimate): 424 GB. Training spans one device so far, so this size waits for sharded training
or for a machine with as much memory; 6 H100-hours' worth of operations at 40 % of its peak.

    gemmaqat plan --config=experiments/31b_q4_0_qat.py
    gemmaqat train --config=experiments/31b_q4_0_qat.py --workdir=runs/31b_q4_0

Shorter rows: --config.data.sequence_length=1024
"""

from gemmaqat.config import base


def get_config(size: str = "31b"):
    cfg = base(size)
    cfg.model.checkpoint = "checkpoints/gemma-4-31b"
    cfg.data.source = "files"
    cfg.data.files = (dict(path="corpus/*.jsonl"),)
    cfg.data.tokenizer = "checkpoints/gemma-4-31b"
    cfg.quantization.recipe = "q4_0_emb"
    cfg.train.method = "qat"
    cfg.train.num_steps = 1_000
    cfg.optimizer.name = "adafactor"
    return cfg
