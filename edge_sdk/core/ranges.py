"""What a number, a name or a text on the wire may be: the types of the fields of records, with their ranges.

A record is refused by its decoder where a value lies outside, and OpenAPI says the same ranges, because both
read these types. Numbers are finite whatever their range. What becomes the name of a file or a part of a
path is an `Id`, a `Digest` or a `Start`: nothing in it means more than text to a file system or a terminal.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MOST = 2**31 - 1  # of what is counted

Count = Annotated[int, Meta(ge=0, le=MOST)]
Several = Annotated[int, Meta(ge=1, le=MOST)]
"""A count of what cannot be none."""
Version = Annotated[int, Meta(ge=0, le=MOST)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
ByteCount = Annotated[int, Meta(ge=0, le=2**50)]
"""Up to a pebibyte."""
Rank = Annotated[int, Meta(ge=1, le=2**16)]
RankOrNone = Annotated[int, Meta(ge=0, le=2**16)]
"""A rank, or 0 where there is none."""
Width = Annotated[int, Meta(ge=1, le=2**24)]
"""One dimension of a module."""

Seconds = Annotated[float, Meta(ge=0, le=1e9)]
"""Up to 31 years."""
Interval = Annotated[float, Meta(gt=0, le=1e9)]
"""Seconds from one event to the next."""
Factor = Annotated[float, Meta(gt=0, le=1e6)]
Decay = Annotated[float, Meta(gt=0, le=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Size = Annotated[float, Meta(ge=0)]
"""A norm, a mean of counts: finite and not negative."""
Loss = Annotated[float, Meta(ge=-3.5e38, le=3.5e38)]
"""What float32 holds."""

# `(?!\n)`: Python's `$` stands before a line break at the end as well.
Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}(?!\n)$")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]
"""A SHA-256 in hex."""
Start = Annotated[str, Meta(pattern=r"^([0-9a-f]{16})?(?!\n)$")]
"""The beginning of a digest, or nothing."""
Run = Annotated[str, Meta(pattern=r"^([1-9][0-9]{0,9}-[0-9a-f]{8})?(?!\n)$")]
"""The number of a coordinator's start and a random id, or nothing."""
Credential = Annotated[str, Meta(pattern=r"^[!-~]{1,256}(?!\n)$")]
"""What fits into an Authorization header."""
Attempt = Annotated[str, Meta(pattern=r"^([A-Za-z0-9_-]{16,64})?(?!\n)$")]
"""A secret that names an attempt to join, or nothing."""
Pin = Annotated[str, Meta(pattern=r"^([A-Za-z0-9_-]{43})?(?!\n)$")]
"""What `edge_sdk.core.invitation.pin_of` makes of a public key, or nothing."""
Key = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}(?!\n)$")]
"""The name of a module, or a number as the key of an object."""
Name = Annotated[str, Meta(max_length=1024)]
"""What somebody calls something; a path at the longest. Whoever shows it makes it harmless first."""
Text = Annotated[str, Meta(max_length=1 << 16)]
