"""Does the quickstart's answer hold for every Gemma 4 shape?

The five miniatures keep what sets their sizes apart: per-layer embeddings and shared keys and
values (E2B, E4B), keys that are also values (12B, 26B-A4B, 31B), experts (26B-A4B).

Measured (one seed): yes at 2 bits, QAT recovers 96 to 100 % of the damage, the control -28 to 12 %.
At 4 bits four shapes give distilled QAT 0.2 to 0.3 of round to nearest's KL over all tokens;
`31b_mini`, which 4 bits hardly hurt, 0.74. Tables and reasons are in experiments/README.md.
Cost: 40 minutes on two CPU cores that had other work, 1.6 GiB of memory.

    gemmaqat compare --config=experiments/five_sizes.py --workdir=runs/five_sizes

Fewer shapes: --config.compare.sizes="('12b_mini', '31b_mini')"
"""

from gemmaqat.config import base


def get_config():
    cfg = base("e2b_mini")
    cfg.compare.sizes = ("e2b_mini", "e4b_mini", "12b_mini", "26b_a4b_mini", "31b_mini")
    cfg.compare.recipes = ("int4_channel", "int2_channel")
    return cfg
