"""Does the quickstart's answer hold for every Gemma 4 shape?

The five miniatures keep what sets their sizes apart: per-layer embeddings and shared keys and
values (E2B, E4B), keys that are also values (12B, 26B-A4B, 31B), experts (26B-A4B).

Expected (one seed): the quickstart's ordering for each shape.
Cost: at most 40 minutes on two CPU cores.

    gemmaqat compare --config=experiments/five_sizes.py --workdir=runs/five_sizes

Fewer shapes: --config.compare.sizes="('12b_mini', '31b_mini')"
"""

from gemmaqat.config import base


def get_config():
    cfg = base("e2b_mini")
    cfg.compare.sizes = ("e2b_mini", "e4b_mini", "12b_mini", "26b_a4b_mini", "31b_mini")
    cfg.compare.recipes = ("int4_channel", "int2_channel")
    return cfg
