"""A download that is not whole yet: the bytes so far, and which file they are of.

    {name}.part         what has come
    {name}.part.etag    the entity tag of the file that it is a part of, written before the first byte

A part is continued only if the file is still the same one (If-Range, RFC 9110, section 13.1.5). Servers may
ignore that for tags, so that the tag of the answer is compared as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx

from edge_sdk.connection.answers import PLAIN, require_plain
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import AdapterError, TooLarge, Unreachable
from edge_sdk.system.durable import move_durably, privately, unwritable

STRONG_TAG = re.compile(r'"[\x21\x23-\x7e]*"')  # a weak one does not promise the same bytes
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")


class Part:
    """The part of one file. `path` is where the whole will lie; it has at most `most_bytes`."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path, self._most_bytes = path, most_bytes
        self._part = path.with_name(path.name + ".part")
        self._tag = path.with_name(path.name + ".part.etag")
        self._size_bytes: int | None = None  # of the whole file, where the answer says it
        self._come_bytes = 0  # of it

    def headers(self) -> dict[str, str]:
        """What to ask for: the rest, on condition that it is of the same file; or everything."""
        have, tag = self._have(), self._known_tag()
        return PLAIN | ({"Range": f"bytes={have}-", "If-Range": tag} if have and tag else {})

    def receive(self, response: httpx.Response) -> Iterator[int]:
        """Write what comes in; yields the size of each piece once it is written.

        Raises:
            Unreachable: the answer does not continue this part, or is longer than such a file can be; the
                next attempt begins anew.
            Unwritable: the disk is full.
        """
        require_plain(response)
        try:
            with open(self._part, self._mode(response), opener=privately) as file:
                have = file.tell()
                self._require_fits(max(have, self._size_bytes or 0))
                for chunk in response.iter_raw():
                    have += len(chunk)
                    self._require_fits(have)
                    self._come_bytes = have
                    yield file.write(chunk)
        except OSError as error:
            raise unwritable(self._part, error) from error
        except TooLarge as error:
            self.discard()
            raise Unreachable(f"the download of {self._path.name} came damaged ({error})") from error

    def _require_fits(self, size_bytes: int) -> None:
        if size_bytes > self._most_bytes:
            raise TooLarge(f"it has more than the {self._most_bytes} bytes that its rank needs")

    def _mode(self, response: httpx.Response) -> Literal["ab", "wb"]:
        """How to open the part for this answer: at its end, or anew after noting which file this is."""
        tag = response.headers.get("ETag", "")
        if response.status_code == 206:
            found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if not found or int(found.group(1)) != self._have() or tag != self._known_tag():
                self.discard()
                raise Unreachable("the partial download was of another file; it starts over")
            self._size_bytes = int(found.group(2))
            return "ab"
        self.discard()
        length = response.headers.get("Content-Length", "")
        self._size_bytes = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else None
        if STRONG_TAG.fullmatch(tag):
            with open(self._tag, "wb", opener=privately) as file:
                file.write(tag.encode())
        return "wb"

    @property
    def is_whole(self) -> bool:
        """Whether all has come that was announced."""
        return self._come_bytes == self._size_bytes

    def finish(self) -> None:
        """Check the whole file and give it its name.

        Raises:
            Unreachable: it is damaged, and thrown away; the next attempt begins anew.
            Unwritable: the disk is full.
        """
        try:
            size_bytes = self._have()
            if size_bytes != (self._size_bytes or size_bytes):
                raise AdapterError(f"it has {size_bytes} bytes of {self._size_bytes}")
            codec.require_whole(self._part)
        except (AdapterError, TooLarge) as error:
            self.discard()
            raise Unreachable(f"the download of {self._path.name} came damaged ({error})") from error
        move_durably(self._part, self._path)
        self.discard()

    def discard(self) -> None:
        """Begin anew."""
        self._part.unlink(missing_ok=True)
        self._tag.unlink(missing_ok=True)

    def _have(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _known_tag(self) -> str:
        try:
            tag = self._tag.read_text()
        except (OSError, UnicodeDecodeError):
            return ""
        return tag if STRONG_TAG.fullmatch(tag) else ""
