r"""My own conversations: fine-tune E2B on them and ship it in 4 bits.

Chat JSONL (`{"messages": [{"role": "user", "content": ...}, ...]}`) goes through the chat template
of the checkpoint's folder; only the replies carry loss. The first fifth of the steps is float,
then quantization sets in.

Expected: depends on the data; watch `eval/loss` in metrics.jsonl.
Cost (estimate): 78 GB (one 80 GB accelerator is at its limit, 141 GB is calm), half an H100-hour
per thousand steps at 40 % of its peak.

    gemmaqat train --config=experiments/e2b_own_data.py --workdir=runs/e2b_own_data \
        --config.data.files="({'path': 'chats/*.jsonl'},)"

Two sources, 3 : 1:
    --config.data.files="({'path': 'chats/*.jsonl', 'weight': 3.0}, {'path': 'notes/*.txt'})"
"""

from gemmaqat.config import base


def get_config(size: str = "e2b"):
    cfg = base(size)
    cfg.model.checkpoint = "checkpoints/gemma-4-e2b-it"
    cfg.data.source = "files"
    cfg.data.files = (dict(path="chats/*.jsonl"),)
    cfg.data.tokenizer = "checkpoints/gemma-4-e2b-it"
    cfg.data.prompt_weight = 0.0  # replies only
    cfg.quantization.recipe = "q4_0_emb"
    cfg.train.method = "qat"
    cfg.train.num_steps = 1_000
    cfg.train.start_step = 200
    cfg.train.eval_every = 100
    cfg.train.accumulation_steps = 16
    cfg.optimizer.name = "adafactor"
    cfg.checkpoint.keep_best = 1
    return cfg
