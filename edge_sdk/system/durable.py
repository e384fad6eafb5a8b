"""Files that survive a crash: written beside their place, and moved there whole. Needs Python alone.

The order is what makes it hold: a file's bytes are on the disk before it gets its name, and the name is on
the disk before anybody is told. And they are their owner's alone: text can be recovered from updates, so what
is made here is 0600 in folders of 0700, whatever the umask of the application says. Windows has no modes;
there the folder of the user keeps others out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from edge_sdk.core.errors import Unwritable

PRIVATE, PRIVATE_FOLDER, FOR_OTHERS = 0o600, 0o700, 0o666
_MOST_NAMED = 3
_users_umask: int | None = None  # while `private` has another one set

Step = Literal["written", "renamed"]
"""Behind what a crash may come: all bytes of the new file are there; it has its name."""


def _unwatched(step: Step) -> None:
    """Nobody looks."""


@contextlib.contextmanager
def replacing(
    path: Path, mode: int = PRIVATE, lasting: bool = True, at: Callable[[Step], None] = _unwatched
) -> Iterator[BinaryIO]:
    """Write a file that takes the place of `path` if the block ends well; otherwise nothing is changed.

    A crash at any moment leaves the old content or the new, and at most `.NAME.tmp` beside it, which the next
    attempt removes. One at a time may write to a path.

    Args:
        path: the file to replace or make; its folder must be there.
        mode: permissions of the new file, of which the umask takes some away.
        lasting: whether that must hold for a power cut as well; a file that can be made again need not wait
            for the disk.
        at: called after each step.

    Raises:
        OSError: the disk is full, read-only or failing; the old content is there, and nothing beside it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # one that a crash left has the mode of its time
    try:
        with create(temporary, mode) as file:
            yield file
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        at("written")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # half a file takes room that is short already
        raise
    at("renamed")
    if lasting:
        fsync_folder(path.parent)


def create(path: Path, mode: int = PRIVATE) -> BinaryIO:
    """Make a file that was not there, with these permissions from the first moment, and open it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    return os.fdopen(descriptor, "wb")


def privately(path: str, flags: int) -> int:
    """An `opener` for `open`: a file that is made by that is its owner's alone."""
    return os.open(path, flags, PRIVATE)


def move_into_place(source: Path, target: Path, at: Callable[[Step], None] = _unwatched) -> None:
    """Give a file that was written at leisure its final name on the same disk, durably.

    Raises:
        OSError: the disk fails; the file has one name or the other.
    """
    fsync_file(source)
    at("written")
    source.replace(target)
    at("renamed")
    fsync_folder(target.parent)


def fsync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows cannot open folders, and makes renames durable by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- whose they are ---


@contextlib.contextmanager
def private() -> Iterator[None]:
    """For a command: all files that its process makes meanwhile are its user's alone, by umask 077."""
    global _users_umask  # noqa: PLW0603 - the umask is the process's too
    before = _users_umask
    _users_umask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(_users_umask)
        _users_umask = before


@contextlib.contextmanager
def for_others() -> Iterator[None]:
    """What is made in this block is to be handed on: as readable as the user's own umask says."""
    if _users_umask is None:
        yield
        return
    before = os.umask(_users_umask)
    try:
        yield
    finally:
        os.umask(before)


def make_folder(folder: Path) -> None:
    """Make a folder where there is none, its user's alone; those above it as well.

    Raises:
        OSError: it cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(PRIVATE_FOLDER, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def make_private(folder: Path, ours: Sequence[str]) -> str | None:
    """Take what is ours in a folder, with all that is below it, away from everybody but its owner.

    The folder itself too, unless something else lies in it or everybody may write there: somebody may have
    named a folder of theirs. Links are not followed, and what belongs to another user stays as it is.

    Args:
        folder: may be missing.
        ours: patterns of the names in it.

    Returns:
        What was mended, in words; None where nothing had to be.
    """
    if os.name == "nt" or not folder.is_dir():
        return None
    lying = sorted(folder.iterdir())
    found = [path for path in lying if any(path.match(pattern) for pattern in ours)]
    shared = len(found) < len(lying) or folder.stat().st_mode & stat.S_ISVTX
    mended = [] if shared or not _mend(folder) else ["the folder itself"]
    for path in found:
        below = sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else []
        mended += [str(one.relative_to(folder)) for one in (path, *below) if _mend(one)]
    if not mended:
        return None
    named = ", ".join(mended[:_MOST_NAMED])
    more = f" and {len(mended) - _MOST_NAMED} more" if len(mended) > _MOST_NAMED else ""
    return f"{folder}: other users could read {named}{more}; now only you can"


def _mend(path: Path) -> bool:
    """Whether others had a right to it, and have none any more."""
    try:
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink() or not mode & 0o077:
            return False
        path.chmod(mode & 0o700)
    except OSError:  # it has just gone, or is another user's
        return False
    return True


# --- for a device, whose owner is told which file it is ---


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path`, whose folder is made where it is missing, as `replacing` does.

    Raises:
        Unwritable: the disk is full, or read-only; the old content is there, and nothing beside it.
    """
    with _named(path):
        make_folder(path.parent)
        with replacing(path) as file:
            file.write(data)


def move_durably(source: Path, target: Path) -> None:
    """`move_into_place` for a device.

    Raises:
        Unwritable: as `write_durably`.
    """
    with _named(target):
        move_into_place(source, target)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> Unwritable:
    """The error for a file that the system would not take."""
    return Unwritable(f"{path} cannot be written ({error.strerror or error}); make room on that disk")
