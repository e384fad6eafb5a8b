"""What the processor is called and which of its instructions matter for training.

Linux tells both in /proc/cpuinfo, macOS by sysctl. Windows tells neither: its features stay unknown.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BOARD = Path("/proc/device-tree/model")  # boards whose cpuinfo names no model, as the Raspberry Pi
SYSCTL_S = 5.0  # a sysctl answers in milliseconds

# Vectors, half precision and int8 products, by the names of the Linux kernel.
X86_FEATURES = {
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
} | {*("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16")}
# asimdhp: float16 arithmetic; asimddp: dot products of int8.
ARM_FEATURES = {"neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"} | {
    *("svei8mm", "svebf16", "sme", "sme2")
}
# macOS spells the same features in another way: Apple's in `hw.optional`, Intel's in `machdep.cpu`.
APPLE_NAMES = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.neon": "asimd",
    "hw.optional.arm.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.arm.FEAT_SME2": "sme2",
}
INTEL_MAC_NAMES = {"avx1.0": "avx", "avx512vnni": "avx512_vnni"}


def cpu_name(cpuinfo: Path = CPUINFO, board: Path = BOARD) -> str:
    """The processor's name as Linux tells it, or as Python does elsewhere."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    if board.is_file():
        return board.read_text(encoding="utf-8", errors="replace").rstrip("\0\n")
    return platform.processor() or platform.machine() or "unknown"


def cpu_features(cpuinfo: Path = CPUINFO) -> tuple[str, ...] | None:
    """Features that matter for training, sorted; None where the system does not tell."""
    if cpuinfo.is_file():
        return linux_features(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    if platform.system() != "Darwin":
        return None
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "hw.optional", "machdep.cpu"],
            capture_output=True,
            text=True,
            timeout=SYSCTL_S,
            check=False,  # Apple silicon has fewer names below machdep.cpu, which sysctl counts as a failure
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return mac_features(done.stdout)


def linux_features(cpuinfo: str) -> tuple[str, ...] | None:
    """Features that every core has: cores of one chip may differ. None if the text names none at all."""
    cores = []
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            cores.append(set(value.split()) & (X86_FEATURES | ARM_FEATURES))
    return tuple(sorted(set.intersection(*cores))) if cores else None


def mac_features(sysctl: str) -> tuple[str, ...] | None:
    """Features from what `sysctl hw.optional machdep.cpu` prints, by their Linux names."""
    found: set[str] = set()
    for line in sysctl.splitlines():
        key, _, value = line.partition(":")
        if key in APPLE_NAMES and value.strip() == "1":
            found.add(APPLE_NAMES[key])
        if key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
            names = (INTEL_MAC_NAMES.get(name, name) for name in value.lower().split())
            found |= set(names) & X86_FEATURES
    return tuple(sorted(found)) if sysctl.strip() else None
