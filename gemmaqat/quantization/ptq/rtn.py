"""Round to nearest: every weight to the closest value of its grid, without data."""

from typing import Any

from gemmaqat.quantization.convert import convert_params
from gemmaqat.quantization.table import Table
from gemmaqat.typing import Params


def quantize(params: Params, table: Table, calibration: Any = None) -> Params:
    """Packed parameters.

    Args:
        params: the float tree.
        table: resolved for it.
        calibration: not used; every method of this package takes it.
    """
    return convert_params(params, table)
