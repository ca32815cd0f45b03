"""Does the quickstart's answer hold on real text?

The same comparison on Python source: the standard library's own files, in tokens of a BPE that is
trained on them. The numbers move a little with the Python version, whose files are the data.

Expected (one seed, a similar miniature): round to nearest at 2 bits raises the perplexity by 60 to
90 %, QAT recovers about 80 % of that, the control nothing.
Cost: about the quickstart's, plus half a minute to train the tokenizer (estimate).

    gemmaqat compare --config=experiments/stdlib_text.py --workdir=runs/stdlib_text

A larger vocabulary: --config.data.bpe_vocab_size=1024
"""

from gemmaqat.config import base


def get_config(size: str = "e2b_mini"):
    cfg = base(size)
    cfg.data.source = "stdlib"
    cfg.data.tokenizer = "bpe"
    cfg.data.prompt_weight = 1.0  # text has no prompts
    cfg.compare.base_steps = 700
    cfg.compare.recipes = ("int4_channel", "int2_channel")
    return cfg
