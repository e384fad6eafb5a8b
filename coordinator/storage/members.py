"""Who takes part: devices and how they stand, the invitations that let them in, and what was noted of both.

Rows only, in SQL; what they mean is decided above. The tables are in `schema.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from coordinator.storage.database import Database
from coordinator.storage.rows import AuditEntry, Device, Invitation, NewMember, Standing
from edge_sdk.core.errors import Unauthorised

AUDIT_ENTRIES = 100_000  # that are kept
ABSENT: tuple[Standing, ...] = ("revoked", "left")  # whose credential lets nobody in
_DEVICES = (
    "SELECT id, name, rank, merged, CAST(staleness_sum AS REAL) / MAX(1, merged), refused, standing, "
    "refused_why, joined_at, seen_at, address FROM devices"
)
_INVITATIONS = "SELECT id, description, made_at, expires_at, uses, used FROM invitations"
_UNMERGED = "device = ? AND merged_version IS NULL AND rejected IS NULL"


@dataclass(frozen=True)
class Offered:
    """A credential that a device was given in place of its own, which holds until this one is used."""

    device: str
    credential_hash: str


class Members:
    """Methods are short, may be called from any thread, and commit at the end.

    Raises (every method): as `Store`.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    # --- devices ---

    def add_device(
        self, id: str, name: str, credential_hash: str, profile: Mapping[str, str], now: float
    ) -> None:
        """Enrol a device that was let in by the join token. Only the hash of its credential is kept."""
        self.join(NewMember(id, name, credential_hash, profile), now)

    def join(self, new: NewMember, now: float) -> str:
        """Enrol a device, and count that in its invitation; or answer a second time to the same attempt.

        Returns:
            The device's id: that of the first time, with the new credential, where the answer to it was lost.

        Raises:
            Unauthorised: its invitation lets nobody in any more; says why.
        """
        with self._db.transaction("device-written", "device-committed") as db:
            again = "SELECT id, standing FROM devices WHERE attempt_hash = ? AND invitation IS ?"
            known = db.execute(again, (new.attempt_hash, new.invitation)).fetchone()
            if known and known[1] not in ABSENT:
                change = "UPDATE devices SET credential_hash = ?, credential_at = ? WHERE id = ?"
                db.execute(change, (new.credential_hash, now, known[0]))
                return str(known[0])
            if new.invitation is not None:
                row = db.execute(f"{_INVITATIONS} WHERE id = ?", (new.invitation,)).fetchone()
                require_valid(Invitation(*row) if row else None, now)
                db.execute("UPDATE invitations SET used = used + 1 WHERE id = ?", (new.invitation,))
            db.execute(
                "INSERT INTO devices(id, name, credential_hash, profile, joined_at, credential_at, standing, "
                "invitation, attempt_hash, address, seen_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    new.id,
                    new.name,
                    new.credential_hash,
                    json.dumps(dict(new.profile)),
                    now,
                    now,
                    new.standing,
                    new.invitation,
                    None if known else new.attempt_hash,
                    new.address,
                    now,
                ),
            )
        return new.id

    def credentials(self) -> dict[str, str]:
        """Hash of a credential -> the device that holds it, but for those who are gone."""
        present = "standing NOT IN ('revoked', 'left')"
        return dict(
            self._db.rows(
                f"SELECT credential_hash, id FROM devices WHERE {present} UNION ALL "
                f"SELECT next_credential_hash, id FROM devices "
                f"WHERE next_credential_hash IS NOT NULL AND {present}"
            )
        )

    def offered(self) -> list[Offered]:
        """Credentials that were given out and not used yet."""
        query = "SELECT id, next_credential_hash FROM devices WHERE next_credential_hash IS NOT NULL"
        return [Offered(*row) for row in self._db.rows(query)]

    def credential_times(self) -> dict[str, float]:
        """Device -> when its credential was made, seconds since 1970."""
        return dict(self._db.rows("SELECT id, credential_at FROM devices"))

    def offer_credential(self, offered: Offered) -> None:
        """Keep a credential that will take the place of the device's own once it is used."""
        with self._db.transaction("credential-written", "credential-committed") as db:
            change = "UPDATE devices SET next_credential_hash = ? WHERE id = ?"
            db.execute(change, (offered.credential_hash, offered.device))

    def take_over(self, used: Iterable[Offered], now: float) -> None:
        """Credentials that were used for the first time: those before them are void."""
        with self._db.transaction("credential-written", "credential-committed") as db:
            db.executemany(
                "UPDATE devices SET credential_hash = next_credential_hash, next_credential_hash = NULL, "
                "credential_at = ? WHERE id = ? AND next_credential_hash = ?",
                ((now, one.device, one.credential_hash) for one in used),
            )

    def note_seen(self, seen: Iterable[tuple[str, float, str]]) -> None:
        """(device, when, address) of those that were heard of since they were noted last."""
        with self._db.transaction("seen-written", "seen-committed") as db:
            change = "UPDATE devices SET seen_at = ?, address = ? WHERE id = ?"
            db.executemany(change, ((at, address, device) for device, at, address in seen))

    def devices(self) -> list[Device]:
        """All devices in order of joining, with what they contributed."""
        return [Device(*row) for row in self._db.rows(f"{_DEVICES} ORDER BY joined_at, rowid")]

    def standings(self) -> dict[str, Standing]:
        """Device -> how it stands, of those that are no members."""
        return dict(self._db.rows("SELECT id, standing FROM devices WHERE standing != 'member'"))

    def set_standing(self, device: str, standing: Standing, why: str) -> None:
        """Change how a device stands. All in one transaction.

        One that takes part no more has its leases ended. What it handed in and is in no version yet is left
        out with `why`, unless it left by itself: what it gave until then counts. With one that is revoked
        goes the invitation that it came by.
        """
        with self._db.transaction("standing-written", "standing-committed") as db:
            db.execute("UPDATE devices SET standing = ? WHERE id = ?", (standing, device))
            if standing in ("suspended", "revoked", "left"):
                db.execute("UPDATE assignments SET open = 0 WHERE device = ? AND open = 1", (device,))
            if standing in ("suspended", "revoked"):
                db.execute(
                    "UPDATE devices SET latest_norm = NULL WHERE id = ? AND latest_arrival IN "
                    f"(SELECT rowid FROM updates WHERE {_UNMERGED})",
                    (device, device),
                )
                db.execute(f"UPDATE updates SET rejected = ? WHERE {_UNMERGED}", (why, device))
            if standing == "revoked":
                of_it = "id = (SELECT invitation FROM devices WHERE id = ?)"
                db.execute(f"DELETE FROM invitations WHERE {of_it}", (device,))

    def invitation_of(self, device: str) -> str | None:
        """The id of the invitation that a device came by; None for the join token of the folder."""
        rows = self._db.rows("SELECT invitation FROM devices WHERE id = ?", device)
        return rows[0][0] if rows else None

    # --- invitations ---

    def invite(self, invitation: Invitation, token_hash: str) -> None:
        """Keep an invitation; of its token only the hash."""
        with self._db.transaction("invitation-written", "invitation-committed") as db:
            db.execute(
                "INSERT INTO invitations(id, token_hash, description, made_at, expires_at, uses, used) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    invitation.id,
                    token_hash,
                    invitation.description,
                    invitation.made_at,
                    invitation.expires_at,
                    invitation.uses,
                    invitation.used,
                ),
            )

    def invitations(self) -> list[Invitation]:
        """All that were made and not deleted, oldest first."""
        return [Invitation(*row) for row in self._db.rows(f"{_INVITATIONS} ORDER BY made_at, rowid")]

    def invited_by(self, token_hash: str) -> Invitation | None:
        """The invitation with this token."""
        rows = self._db.rows(f"{_INVITATIONS} WHERE token_hash = ?", token_hash)
        return Invitation(*rows[0]) if rows else None

    def uninvite(self, id: str) -> bool:
        """Delete an invitation; whether it was there."""
        with self._db.transaction("invitation-written", "invitation-committed") as db:
            return bool(db.execute("DELETE FROM invitations WHERE id = ?", (id,)).rowcount)

    # --- what was noted ---

    def note(self, entries: Iterable[AuditEntry]) -> None:
        """Add to the audit log, and forget what is older than the newest AUDIT_ENTRIES."""
        with self._db.transaction("audit-written", "audit-committed") as db:
            db.executemany(
                "INSERT INTO audit(at, what, device, address, detail, times) VALUES (?, ?, ?, ?, ?, ?)",
                ((e.at, e.what, e.device, e.address, e.detail, e.times) for e in entries),
            )
            newest = "SELECT MAX(id) FROM audit"
            db.execute(f"DELETE FROM audit WHERE id <= ({newest}) - ?", (AUDIT_ENTRIES,))

    def audit(self, newest: int) -> list[AuditEntry]:
        """The newest entries, oldest of them first."""
        query = "SELECT at, what, device, address, detail, times FROM audit ORDER BY id DESC LIMIT ?"
        return [AuditEntry(*row) for row in reversed(self._db.rows(query, newest))]


def require_valid(invitation: Invitation | None, now: float) -> None:
    """Raise Unauthorised unless an invitation lets one more device in.

    `now`: seconds since 1970, by the host's clock.
    """
    if invitation is None:
        raise Unauthorised("this invitation is not known here; ask the host for another")
    if now >= invitation.expires_at:
        raise Unauthorised("this invitation has expired; ask the host for another")
    if invitation.uses is not None and invitation.used >= invitation.uses:
        raise Unauthorised("this invitation has been used; ask the host for another")
