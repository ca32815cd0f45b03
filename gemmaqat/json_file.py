"""JSON that somebody else may have written or damaged: an object, or one clear error."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path, otherwise: str = "fetch it again") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file, in UTF-8.
        otherwise: what to do where it is unreadable.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, no JSON, nested too deeply or no object; the message names it.
    """
    return parse_json(path.read_bytes(), str(path), otherwise)


def parse_json(text: str | bytes, where: str, otherwise: str = "fetch it again") -> dict[str, Any]:
    """The object in a JSON text, whose place an error names `where`.

    Raises:
        ValueError: as `read_json`.
    """
    try:
        found = json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply; {otherwise}.") from None
    except ValueError as error:  # of the encoding or of JSON
        raise ValueError(f"{where}: not valid JSON ({error}); {otherwise}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: holds no JSON object; {otherwise}.")
    return found
