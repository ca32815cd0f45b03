"""How much memory the devices have left, and how bytes are written for people."""

import os
import re
from pathlib import Path

import jax


def free_bytes(device: jax.Device | None = None) -> int | None:
    """Memory that a program may still take on one device (of the host, for CPU devices).

    Returns:
        Bytes, or None where the platform does not tell.
    """
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return _host_free_bytes()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def format_bytes(count: int | float) -> str:
    """Three significant digits and a binary unit: `1.46 GiB`."""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while abs(count) >= 1000 and unit != "TiB":
        count, unit = count / 1024, next(units)
    return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"


def parse_bytes(text: str, *, where: str) -> float:
    """The bytes of `8GiB`, `60 GB` or `1e9`; a trailing `/s` is allowed.

    Raises:
        ValueError: not such a text; the message begins with `where`.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kKMGT]?i?B?)(?:/s)?\s*", text)
    factors = {"": 1} | {p: 1000**i for i, p in enumerate("KMGT", 1)}
    factors |= {f"{p}i": 1024**i for i, p in enumerate("KMGT", 1)}
    prefix = match[2].removesuffix("B").upper().replace("I", "i") if match else "?"
    try:
        count = float(match[1]) * factors[prefix] if match else 0.0
    except (KeyError, ValueError):
        count = 0.0
    if count <= 0:
        raise ValueError(f"{where}={text}: no amount; write for example 8GiB or 60GB.")
    return count


def _host_free_bytes() -> int | None:
    """Available memory of the machine or of the container's limit, whichever is smaller."""
    known = [value for value in (_system_available(), _container_available()) if value is not None]
    return min(known, default=None)


def _system_available() -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # macOS: the total, the best it tells
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container_available() -> int | None:
    """What a version 2 control group leaves; page cache that can be dropped counts as free."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
