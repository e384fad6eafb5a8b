"""What must survive a power cut on the device: the session, the checkpoint and the finished adapter.

session.json                 replaced as a whole, readable by the owner alone (it holds the credential)
checkpoint.safetensors       of the assignment in hand; the trainer writes it
outbox.safetensors           the finished adapter, until it is delivered
adapters/{…}.safetensors     downloaded versions; can be fetched again
digests.json                 of the base model's files, which take a minute to read
link.json                    measured throughput to the coordinator (see `link`)
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from edge_sdk.core.errors import InputError, ProtocolError
from edge_sdk.core.records import from_json, to_json
from edge_sdk.session import Session

SESSION, DIGESTS = "session.json", "digests.json"


class Journal:
    """The state folder of one device in one federation. One process at a time holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adapters = folder / "adapters"
        try:
            self.adapters.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: no usable state folder ({error.strerror}); name another") from error
        self.checkpoint = folder / "checkpoint.safetensors"
        self.outbox = folder / "outbox.safetensors"
        self.link = folder / "link.json"
        self._session = folder / SESSION

    def load(self) -> Session | None:
        """The session as last saved; None on a new device.

        Raises:
            InputError: the file cannot be understood; names it.
        """
        if not self._session.exists():
            return None
        try:
            return from_json(Session, json.loads(self._session.read_text()))
        except (ValueError, ProtocolError) as error:
            raise InputError(f"{self._session}: not a session ({error}); remove it to join anew") from error

    def save(self, session: Session) -> None:
        """Make `session` the one that survives."""
        write_durably(self._session, json.dumps(to_json(session), indent=1).encode(), mode=0o600)

    def put_outbox(self, adapter: bytes) -> None:
        """Keep a finished adapter until it is delivered."""
        write_durably(self.outbox, adapter)

    def clear_work(self) -> None:
        """Forget checkpoint and outbox, once the session no longer needs them."""
        self.checkpoint.unlink(missing_ok=True)
        self.outbox.unlink(missing_ok=True)

    def forget_adapters(self, keep: set[str]) -> None:
        """Remove downloaded versions other than these file names."""
        for path in self.adapters.iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` so that a crash at any moment leaves the old content or the new, and nothing else."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # one that a crash left has the mode of its time
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name != "nt":  # Windows cannot open a folder, and makes renames durable by itself
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
