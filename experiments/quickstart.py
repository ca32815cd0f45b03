"""What do 4 and 2 bits per weight cost a Gemma 4 shape, and how much does QAT buy back?

Trains a miniature from scratch on generated tasks, then gives each recipe the same four arms on
the same tokens: round to nearest, QAT, QAT distilled from the float model, and a control that
trains on in float before rounding.

Measured (one seed): at 2 bits round to nearest raises the answer perplexity from 1.003 to 1.90; QAT
recovers 99 % of that, the control -28 %: more float training made it worse. At 4 bits round to
nearest costs only 0.3 %, and the distilled arm has 0.53 of its KL to the float base.
Cost: 3 minutes on two idle CPU cores with a cold compilation cache, 1.1 GiB of memory.

    gemmaqat compare --config=experiments/quickstart.py --workdir=runs/quickstart

Another shape: --config=experiments/quickstart.py:26b_a4b_mini
More seeds:    --config.compare.seeds="(0, 1, 2)"
"""

from gemmaqat.config import base


def get_config(size: str = "e2b_mini"):
    cfg = base(size)
    cfg.compare.recipes = ("int4_channel", "int2_channel")
    return cfg
