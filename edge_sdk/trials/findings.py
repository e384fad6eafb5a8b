"""What was found out about this machine and need not be found out again: JSON files in the cache folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_sdk.core.errors import Unwritable
from edge_sdk.system.durable import write_durably
from edge_sdk.system.terminal import logger

log = logger("edge_sdk")


def recall(path: Path) -> dict[str, Any]:
    """Findings by their keys; a missing or damaged file only means that they are made again."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(path: Path, key: str, finding: Any) -> None:
    """Add one. A folder that cannot be written costs the next start some seconds, and nothing else."""
    try:
        write_durably(path, json.dumps(recall(path) | {key: finding}, indent=1).encode())
    except Unwritable as error:
        log.warning("%s; it is found out again next time", error)
