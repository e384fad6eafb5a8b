"""Packages called bitsandbytes that are broken in the ways in which real ones are, to put on a path."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Breakage = Literal["raises", "illegal instruction", "abort", "import raises", "import crashes"]

# Of a wheel that imports well: what fails is the first kernel, which quantising calls.
IMPORTS_WELL = """
import os, signal, torch

class Params4bit(torch.nn.Parameter):
    def __new__(cls, data, requires_grad=False, **kwargs):
        return torch.Tensor._make_subclass(cls, data, False)

    def __init__(self, *args, **kwargs):
        pass

class Linear4bit(torch.nn.Linear):
    def __init__(self, i, o, bias=True, **kwargs):
        super().__init__(i, o, bias=bias)

    def to(self, device):
        {kernel}

class Linear8bitLt(torch.nn.Linear):
    pass

class nn:
    Params4bit, Linear4bit, Linear8bitLt = Params4bit, Linear4bit, Linear8bitLt
"""

CODE: dict[Breakage, str] = {
    "raises": IMPORTS_WELL.format(kernel="raise RuntimeError('no kernel image for this device')"),
    "illegal instruction": IMPORTS_WELL.format(kernel="os.kill(os.getpid(), signal.SIGILL)"),
    "abort": IMPORTS_WELL.format(kernel="os.abort()"),
    "import raises": "raise OSError('libcudart.so.12: cannot open shared object file')",
    "import crashes": "import ctypes; ctypes.string_at(0)",
}

REASONS: dict[Breakage, str] = {
    "raises": "bitsandbytes failed at its first kernels: RuntimeError: no kernel image for this device",
    "illegal instruction": "bitsandbytes failed at its first kernels: the process was killed by SIGILL",
    "abort": "bitsandbytes failed at its first kernels: the process was killed by SIGABRT",
    "import raises": "bitsandbytes failed when it was imported: OSError: libcudart.so.12: cannot open",
    "import crashes": "bitsandbytes failed when it was imported: the process was killed by SIGSEGV",
}


def write_package(code: str, site: Path) -> Path:
    """Write a package called bitsandbytes below `site`, which is to be put on a path; returns `site`."""
    (site / "bitsandbytes").mkdir(parents=True)
    (site / "bitsandbytes" / "__init__.py").write_text(code)
    return site
