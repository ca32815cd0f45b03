"""What does the phone's format (wNa8o8) cost E2B and E4B, and how much does QAT buy back?

Weights of 2, 4 and 8 bits per channel, 2-bit token table and head, static int8 activations around
every linear and int8 keys and values, on the miniatures. The report gives every arm with the
clamps of its activations, which are part of the model, and without them.

Measured (one seed): QAT recovers 97 % of the perplexity damage of e2b_mini and 86 % of e4b_mini's,
the control -21 and 6 %. Dropping the clamps changes the perplexity by less than 1 %, where they are
tight (calibration_method=percentile,99) for the worse, by 3 to 5 % in e2b_mini and 0.2 to 0.3 % in
e4b_mini; tables are in README.md.
Cost: 3.5 minutes for e2b_mini on two CPU cores with some other work; e4b_mini took 9 minutes with
much of it.

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
