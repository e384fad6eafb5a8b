"""Where devices find the coordinator of a data folder, as its last start wrote down, for its invitations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordinator.storage.store import Store
from edge_sdk.core.errors import InputError, ProtocolError
from edge_sdk.core.invitation import Invitation
from edge_sdk.core.ranges import Name, Pin
from edge_sdk.core.records import decode, encode

_ROW = "announcement"


@dataclass(frozen=True)
class Announcement:
    """An address, the pin of the key that answers there, and whether owners must allow plain HTTP."""

    url: Name
    pin: Pin = ""
    insecure: bool = False

    def invitation(self, token: str) -> Invitation:
        """What lets a device in by this join token."""
        return Invitation(self.url, token, self.pin)

    def command(self, token: str) -> str:
        """What an owner types."""
        flag = " --insecure" if self.insecure else ""
        return f"edge-sdk join '{self.invitation(token)}'{flag} --data notes.jsonl"


def announce(store: Store, announcement: Announcement) -> None:
    """Write it down, where it is not written yet.

    Raises:
        DiskFull, InternalError: the disk does not take it.
    """
    text = encode(announcement).decode()
    if store.meta(_ROW) != text:
        store.set_meta(_ROW, text)


def announced(store: Store, folder: Path) -> Announcement:
    """What the last start on this folder wrote.

    Raises:
        InputError: there was none since this was written down, or its record is damaged.
    """
    text = store.meta(_ROW)
    try:
        if text is not None:
            return decode(Announcement, text)
    except (ValueError, ProtocolError):
        pass
    raise InputError(f"{folder}: no address is known yet; start `edge-coordinator serve` on it once")
