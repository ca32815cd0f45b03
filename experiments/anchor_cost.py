"""What do the anchored 5-bit scales of `q4_0` cost a model, against blocks that are free of both?

`q4_0` holds a code -8 in every block and scales of five significant bits, so that a bfloat16
checkpoint and the stock quantizer keep every code; `q4_0_free` has any scale. Both start from the
same float base, on the same tokens in the same order.

Measured (two miniatures, one seed): after training the KL of `q4_0` is 0.69 to 1.96 times that of
`q4_0_free`, on either side of 1; no interval lies above 1, but they are wide. Round to nearest over
all tokens has 0.83 and 0.90 of it. Tables are in README.md.
Cost: 7 and 10 minutes from a finished base, on two CPU cores with much other work.

    gemmaqat compare --config=experiments/anchor_cost.py --workdir=runs/anchor_e2b_mini
    gemmaqat compare --config=experiments/anchor_cost.py:31b_mini --workdir=runs/anchor_31b_mini
"""

from gemmaqat.config import base


def get_config(size: str = "e2b_mini"):
    cfg = base(size)
    cfg.compare.recipes = ("q4_0", "q4_0_free")
    return cfg
