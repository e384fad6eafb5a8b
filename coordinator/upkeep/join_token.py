"""The federation's join token: made at the first start, readable by the host alone."""

from __future__ import annotations

import secrets
from pathlib import Path

from coordinator.storage.disk import fsync_file, fsync_folder
from coordinator.storage.failpoints import reach
from edge_sdk.core.errors import InputError

NAME = "join-token"


def join_token(folder: Path) -> str:
    """The token of this data folder.

    Raises:
        InputError: the file can be neither made nor read, or is empty.
    """
    path = folder / NAME
    try:
        if not path.exists():
            write_token(path, secrets.token_hex(16))  # never begins with a dash, as an option would
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the join token can be neither made nor read ({error})") from error
    if not token:
        raise InputError(f"{path} is empty; remove it, and a new join token is made")
    return token


def write_token(path: Path, token: str) -> None:
    """Put it in its place whole and durably: half a token lets nobody in."""
    made = path.with_name(f".{path.name}-new")
    made.unlink(missing_ok=True)
    made.touch(mode=0o600)
    made.write_text(token + "\n")
    fsync_file(made)
    reach("token-written")
    made.replace(path)
    reach("token-renamed")
    fsync_folder(path.parent)
