"""What does the phone's format (wNa8o8) cost E2B and E4B, and how much does QAT buy back?

Weights of 2, 4 and 8 bits per channel, 2-bit token table and head, static int8 activations around
every linear and int8 keys and values, on the miniatures. The report gives every arm with the
clamps of its activations, which are part of the model, and without them.

Expected: round to nearest breaks the 2-bit parts, QAT repairs them; figures in README.md.
Cost: 5 minutes per miniature on two idle CPU cores (estimate from the quickstart).

    gemmaqat compare --config=experiments/mobile_mini.py --workdir=runs/mobile_e2b_mini
    gemmaqat compare --config=experiments/mobile_mini.py:e4b_mini --workdir=runs/mobile_e4b_mini

Scales that train with the weights: --config.quantization.learn_activation_scales=True
"""

from gemmaqat.config import base


def get_config(size: str = "e2b_mini"):
    cfg = base(size)
    cfg.quantization.recipe = f"mobile_{size}"
    cfg.compare.recipes = (f"mobile_{size}",)
    return cfg
