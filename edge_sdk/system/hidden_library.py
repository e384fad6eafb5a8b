"""A library that a process must not import, because importing it there would end the process.

PEFT imports bitsandbytes wherever it finds it, whether the base is quantised or not; and a wheel of
bitsandbytes that was built for another processor does not raise an error but kills the process.
"""

from __future__ import annotations

import sys

BITSANDBYTES = "bitsandbytes"


def hide_bitsandbytes() -> None:
    """From now on nothing in this process finds bitsandbytes, unless it has been imported already."""
    # None is Python's own mark for a module that is not to be found.
    sys.modules.setdefault(BITSANDBYTES, None)  # type: ignore[arg-type]
