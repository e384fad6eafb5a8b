"""What must survive a power cut on the device: the session, the checkpoint and the finished adapter.

session.json                 replaced as a whole, readable by the owner alone (it holds the credential)
checkpoint.safetensors       of the assignment in hand; the trainer writes it
outbox.safetensors           the finished adapter, until it is delivered
adapters/{…}.safetensors     downloaded versions; can be fetched again (`served` for one that only asks)
attempt                      a secret that is sent with each try to join, until one is answered
digests.json                 of the base model's files, which take a minute to read
link.json                    measured throughput to the coordinator (see `link_speed`)
memory.json                  measured against estimated memory (see `corrections`)
lock                         held by the agent that trains; the system lets go of it when that process ends
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from edge_sdk.core.errors import InputError, ProtocolError
from edge_sdk.core.records import decode, encode
from edge_sdk.membership.session import Session
from edge_sdk.system.durable import PRIVATE, make_folder, make_private, write_durably

SESSION, ATTEMPT, DIGESTS = "session.json", "attempt", "digests.json"
LEFT_BEHIND = (".*.tmp", "*.new")  # by a process that was killed while it wrote; `.new` by earlier releases
OURS = (
    SESSION,
    ATTEMPT,
    DIGESTS,
    "checkpoint.*",
    "outbox.*",
    "adapters",
    "served",
    "link.json",
    "memory.json",
    "lock",
)


class Journal:
    """The state folder of one device in one federation. One agent at a time trains with it: see `held`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adapters = folder / "adapters"
        try:
            make_folder(self.adapters)
        except OSError as error:
            raise InputError(f"{folder}: no usable state folder ({error.strerror}); name another") from error
        self.checkpoint = folder / "checkpoint.safetensors"
        self.outbox = folder / "outbox.safetensors"
        self.link = folder / "link.json"
        self._session = folder / SESSION
        self._lock = FileLock(folder / "lock", thread_local=False, mode=PRIVATE)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the one agent that trains with this folder, while inside. A process that dies lets go of it.

        Raises:
            InputError: another agent is at it, in this process or another.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"{self.folder}: another agent trains with this state folder; stop that one, or give this "
                "one a folder of its own (--state, or Options.state_dir)"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise InputError(f"{self.folder}: cannot be locked ({error}); name another folder") from error
        try:
            if self._lock.lock_counter == 1:  # not within another `held` of this agent
                self._tidy()
            yield
        finally:
            self._lock.release()

    def mend(self) -> str | None:
        """Take what an earlier release left readable away from other users; says what it was."""
        return make_private(self.folder, (*OURS, *LEFT_BEHIND))

    def _tidy(self) -> None:
        for pattern in LEFT_BEHIND:
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def load(self) -> Session | None:
        """The session as last saved; None on a new device.

        Raises:
            InputError: the file cannot be understood; names it.
        """
        try:
            return decode(Session, self._session.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{self._session}: cannot be read ({error.strerror}); mend that") from error
        except (ValueError, ProtocolError) as error:
            raise InputError(f"{self._session}: not a session ({error}); remove it to join anew") from error

    def save(self, session: Session) -> None:
        """Make `session` the one that survives.

        Raises:
            Unwritable: the one before survives.
        """
        write_durably(self._session, encode(session, indent=1))

    def attempt(self) -> str:
        """The secret of the attempt to join that is under way: the same over restarts, until it is answered.

        Raises:
            Unwritable: it cannot be kept.
        """
        path = self.folder / ATTEMPT
        with contextlib.suppress(OSError, UnicodeDecodeError):
            known = path.read_text(encoding="ascii")
            if re.fullmatch(r"[A-Za-z0-9_-]{32}", known):
                return known
        made = secrets.token_urlsafe(24)
        write_durably(path, made.encode())
        return made

    def end_attempt(self) -> None:
        """It was answered, and the session is kept."""
        (self.folder / ATTEMPT).unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove what made this device a member, and all that it holds of the federation."""
        for pattern in OURS:
            for path in self.folder.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != "lock":
                    path.unlink(missing_ok=True)

    def clear_work(self) -> None:
        """Forget checkpoint and outbox, once the session no longer needs them."""
        self.checkpoint.unlink(missing_ok=True)
        self.outbox.unlink(missing_ok=True)
