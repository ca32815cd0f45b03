r"""How much of Q4_0's damage to E2B does QAT buy back, beyond what more training does anyway?

Starts from the published weights, then round to nearest, QAT, distilled QAT and the float control,
on the same tokens of your text; embedding tables included. Q4_0 is mild, so judge by KL as well as
by perplexity.

Expected: not measured at this size; bits_ladder.py asks the same of a miniature.
Cost (estimate): 100 GB for the distilled arm (one 141 GB accelerator); the three trained arms take
1.5 H100-hours at 40 % of its peak.

    gemmaqat compare --config=experiments/e2b_q4_0_qat.py --workdir=runs/e2b_q4_0 \
        --config.model.checkpoint=checkpoints/gemma-4-e2b

Your text: --config.data.files="({'path': 'corpus/*.txt'},)"
"""

from gemmaqat.config import base


def get_config(size: str = "e2b"):
    cfg = base(size)
    cfg.model.checkpoint = "checkpoints/gemma-4-e2b"
    cfg.data.source = "files"
    cfg.data.files = (dict(path="corpus/*.jsonl"),)
    cfg.data.tokenizer = "checkpoints/gemma-4-e2b"
    cfg.quantization.recipe = "q4_0_emb"
    cfg.compare.recipes = ("q4_0_emb",)
    cfg.optimizer.name = "adafactor"
    cfg.train.accumulation_steps = 16  # one row of 2,048 tokens at a time
    return cfg
