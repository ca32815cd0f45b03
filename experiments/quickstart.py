"""What do 4 and 2 bits per weight cost a Gemma 4 shape, and how much does QAT buy back?

Trains a miniature from scratch on generated tasks, then gives each recipe the same four arms on
the same tokens: round to nearest, QAT, QAT distilled from the float model, and a control that
trains on in float before rounding.

Expected (one seed): at 2 bits round to nearest raises the perplexity several times over and QAT
recovers more than 60 % of that, the control close to nothing; at 4 bits the distilled arm has at
most 0.6 of round to nearest's KL.
Cost: some minutes on two CPU cores, under 2 GiB of memory.

    gemmaqat compare --config=experiments/quickstart.py --workdir=runs/quickstart

Another shape: --config=experiments/quickstart.py:26b_a4b_mini
More seeds:    --config.compare.seeds="(0, 1, 2)"
"""

from gemmaqat.config import base


def get_config(size: str = "e2b_mini"):
    cfg = base(size)
    cfg.compare.recipes = ("int4_channel", "int2_channel")
    return cfg
