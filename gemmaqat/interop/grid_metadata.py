"""Grids in the header of a file, which say more of a parameter than its bits and blocks.

Formats store codes and scales; how a scale is chosen, its significant bits and the anchor are told
beside them, so that a file that is trained further is rounded as it was.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from gemmaqat.json_file import parse_json
from gemmaqat.quantization.grid import Grid

GRIDS_KEY = "gemmaqat.grids"


def grids_metadata(grids: Mapping[str, Grid]) -> dict[str, str]:
    """The header's entry for the grids of parameters by path."""
    known = list(dict.fromkeys(grids.values()))
    fields = [dataclasses.asdict(grid) for grid in known]
    numbers = {path: known.index(grid) for path, grid in grids.items()}
    return {GRIDS_KEY: json.dumps({"grids": fields, "parameters": numbers})}


def known_grids(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of the grids in a header, by parameter; nothing is known of them yet.

    Raises:
        ValueError: the metadata is damaged.
    """
    try:
        found = parse_json(metadata.get(GRIDS_KEY, "{}"), where)
        grids = list(found.get("grids", []))
        return {str(path): grids[number] for path, number in found.get("parameters", {}).items()}
    except (AttributeError, IndexError, TypeError, ValueError):
        raise ValueError(
            f"{where}: the header's {GRIDS_KEY!r} is damaged; restore it from a copy."
        ) from None


def parse_grid(fields: Any, where: str) -> Grid:
    """A grid from its fields.

    Raises:
        ValueError: they make none.
    """
    try:
        return Grid(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: no grid that this library has ({error})") from None


def contradiction(where: str, grid: Grid, found: str) -> ValueError:
    """The error of a header that describes another grid than the tensors have."""
    return ValueError(
        f"{where}: the header says {grid.describe()}, the tensors have {found}; they do not belong "
        "together."
    )
