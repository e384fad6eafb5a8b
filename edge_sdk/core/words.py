r"""Text from strangers, made fit to be shown: none of it moves a cursor, ends a line or turns it round.

A device's name, a coordinator's reasons and an answer of a model are whatever the other side sent. Controls
(ESC and the newline among them), line separators, bidirectional and other invisible format characters, and
halves of surrogate pairs become visible escapes such as `\x1b` and `\u202e`. All other Unicode stays.
"""

from __future__ import annotations

import unicodedata

MOST = 300  # characters of a line, unless told otherwise
CUT = "…"
_JOINER = "\u200d"  # holds emoji of several parts together, and letters of some scripts
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # Unicode's general categories
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: object, most: int = MOST) -> str:
    """One harmless line that says `text`, of at most `most` characters; what was longer ends in an ellipsis.

    Doing it twice is the same as once.
    """
    line = str(text)
    if len(line) <= most and line.isprintable():
        return line
    pieces: list[str] = []
    room = most
    for character in line[: most + 1]:
        pieces.append(_shown(character))
        room -= len(pieces[-1])
        if room < 0:
            break
    else:
        return "".join(pieces)
    while pieces and room < len(CUT):
        room += len(pieces.pop())
    return "".join(pieces) + CUT


def printable_lines(text: str) -> str:
    """`text` with its line breaks (LF) and tabs, and every other character as `printable` shows it."""
    return "".join(c if c in "\n\t" or c.isprintable() else _shown(c) for c in text)


def _shown(character: str) -> str:
    """A character, or its escape where showing it would do something else."""
    if character == _JOINER or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if code <= 0xFF:
        return _SHORT.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
