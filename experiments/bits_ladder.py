"""Which grid loses how much, from 8 bits down to ternary, and where does QAT begin to matter?

One float base, then the arms of the quickstart for eight recipes: the curve of quality against
bits per weight.

Expected (not measured): nothing to recover at 8 bits; the gain of QAT over the control grows as the
bits fall and is largest on the 2-bit and ternary grids.
Cost: about three times the quickstart (estimate).

    gemmaqat compare --config=experiments/bits_ladder.py --workdir=runs/bits_ladder

Another shape: --config=experiments/bits_ladder.py:31b_mini
"""

from gemmaqat.config import base


def get_config(size: str = "e2b_mini"):
    cfg = base(size)
    cfg.compare.recipes = (
        "int8",
        "int4_channel",
        "q4_0",
        "w4a16_g32",
        "int3_channel",
        "int2_channel",
        "int2_mid_channel",
        "ternary",
    )
    return cfg
