"""The probe: control groups from a made-up tree, threads, names, and one run on this very machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.probe import GroupLimits, cpu_name, measure_gflops, probe, read_limits, useful_threads

UNLIMITED_V1 = "9223372036854771712"


def make(root: Path, files: dict[str, str]) -> None:
    """Write a tree of pseudo-files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def limits(tmp_path: Path, membership: str, files: dict[str, str]) -> GroupLimits:
    root = tmp_path / "cgroup"
    root.mkdir()
    make(root, files)
    (tmp_path / "self").write_text(membership)
    return read_limits(root, tmp_path / "self")


def test_v2_the_tightest_level_holds(tmp_path: Path) -> None:
    found = limits(
        tmp_path,
        "0::/user/app\n",
        {
            "user/app/memory.max": "max",
            "user/app/memory.current": "900",
            "user/app/cpu.max": "max 100000",
            "user/memory.max": "5000",
            "user/memory.current": "3000",
            "user/memory.stat": "anon 1500\ninactive_file 1000\nactive_file 500",
            "user/cpu.max": "150000 100000",
            "memory.stat": "anon 1",  # the root has no limit file
        },
    )
    assert found == GroupLimits(memory_bytes=5000, memory_free_bytes=3000, cpus=1.5)


def test_v1_named_controllers_each_have_a_tree(tmp_path: Path) -> None:
    found = limits(
        tmp_path,
        "9:name=systemd:/x\n5:cpuacct,cpu:/job\n3:memory:/job\n",
        {
            "memory/job/memory.limit_in_bytes": "4000",
            "memory/job/memory.usage_in_bytes": "1000",
            "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 400",
            "memory/memory.limit_in_bytes": UNLIMITED_V1,
            "memory/memory.usage_in_bytes": "100000",
            "cpu/job/cpu.cfs_quota_us": "200000",
            "cpu/job/cpu.cfs_period_us": "100000",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert found == GroupLimits(memory_bytes=4000, memory_free_bytes=3400, cpus=2.0)


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    files = {"memory.max": "700", "memory.current": "800", "cpu.max": "50000 100000"}
    found = limits(tmp_path, "0::/docker/5ca1ab1e\n", files)
    assert found == GroupLimits(memory_bytes=700, memory_free_bytes=0, cpus=0.5)


@pytest.mark.parametrize("membership", ["0::/../outside\n", "0::/\n", "4:memory:/\n", ""])
def test_no_limits(tmp_path: Path, membership: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "memory.max").write_text("1\n")
    assert limits(tmp_path, membership, {}) == GroupLimits()


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    assert read_limits(tmp_path, tmp_path / "absent") == GroupLimits()


@pytest.mark.parametrize(
    ("cores", "physical", "quota", "threads"),
    [(8, 4, None, 4), (2, 4, None, 2), (8, None, None, 8), (8, 4, 2.5, 2), (8, 4, 0.5, 1), (1, 1, 16.0, 1)],
)
def test_useful_threads(cores: int, physical: int | None, quota: float | None, threads: int) -> None:
    assert useful_threads(cores, physical, quota) == threads


@given(st.integers(1, 256), st.none() | st.integers(1, 128), st.none() | st.floats(0.01, 300))
def test_threads_are_at_least_one_and_never_more_than_cores(
    cores: int, physical: int | None, quota: float | None
) -> None:
    assert 1 <= useful_threads(cores, physical, quota) <= cores


def test_cpu_names(tmp_path: Path) -> None:
    x86, arm, board = tmp_path / "x86", tmp_path / "arm", tmp_path / "board"
    x86.write_text("processor\t: 0\nmodel name\t: Intel(R) N100\nmodel name\t: other\n")
    arm.write_text("processor\t: 0\nBogoMIPS\t: 108.00\n")
    board.write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    assert cpu_name(x86, board) == "Intel(R) N100"
    assert cpu_name(arm, board) == "Raspberry Pi 5 Model B Rev 1.0"
    assert cpu_name(tmp_path / "absent", tmp_path / "absent") != ""


def test_this_machine() -> None:
    profile = probe(quick=True)
    assert profile.gflops is None
    assert 1 <= profile.threads <= profile.cores <= (psutil.cpu_count() or 1)
    assert profile.memory_available_bytes is not None
    assert profile.disk_free_bytes is not None
    assert 0 < profile.memory_available_bytes <= profile.memory_total_bytes <= psutil.virtual_memory().total
    assert profile.trainable_memory_bytes() > 0


def test_the_matrix_product_is_timed() -> None:
    assert measure_gflops() > 0.01


def test_importing_the_probe_does_not_load_torch() -> None:
    code = "import sys, edge_sdk.probe; assert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
