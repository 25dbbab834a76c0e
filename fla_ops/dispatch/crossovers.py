"""Where one form overtakes another: sizes from crossovers.json, which says how each was found."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("crossovers.json")


@cache
def crossovers(family: str, device: str, gradient: bool) -> dict[str, int]:
    """The thresholds of a family on a device type; devices without a row of their own take the GPU's."""
    rows = json.loads(TABLE.read_text())[family]
    found: dict[str, int] = rows.get(device, rows["cuda"])["training" if gradient else "forward"]
    return found
