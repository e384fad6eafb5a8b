"""The probe: control groups and processors from made-up files, and runs on this very machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.errors import InputError
from edge_sdk.core.profile import Accelerator
from edge_sdk.machine import torch_device
from edge_sdk.machine.cgroups import GroupLimits, read_limits
from edge_sdk.machine.probe import existing, probe, useful_threads
from edge_sdk.machine.processor import cpu_features, cpu_name, linux_features, mac_features

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
            "user/memory.swap.max": "200",
            "user/memory.swap.current": "50",
            "user/app/memory.swap.max": "max",
            "memory.stat": "anon 1",  # the root has no limit file
        },
    )
    assert found == GroupLimits(5000, 3000, cpus=1.5, swap_bytes=200, swap_free_bytes=150)


def test_v1_named_controllers_each_have_a_tree(tmp_path: Path) -> None:
    found = limits(
        tmp_path,
        "9:name=systemd:/x\n5:cpuacct,cpu:/job\n3:memory:/job\n",
        {
            "memory/job/memory.limit_in_bytes": "4000",
            "memory/job/memory.usage_in_bytes": "1000",
            "memory/job/memory.memsw.limit_in_bytes": "4500",
            "memory/job/memory.memsw.usage_in_bytes": "1100",
            "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 400",
            "memory/memory.limit_in_bytes": UNLIMITED_V1,
            "memory/memory.usage_in_bytes": "100000",
            "memory/memory.memsw.limit_in_bytes": UNLIMITED_V1,
            "cpu/job/cpu.cfs_quota_us": "200000",
            "cpu/job/cpu.cfs_period_us": "100000",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert found == GroupLimits(4000, 3400, cpus=2.0, swap_bytes=500, swap_free_bytes=400)


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


def test_cpu_features_of_linux() -> None:
    x86 = "flags\t\t: fpu sse avx2 f16c amx_bf16 avx512_bf16\n"
    assert linux_features(x86) == ("amx_bf16", "avx2", "avx512_bf16", "f16c")
    # The small cores of a phone lack what the large ones have, and a thread may run on either.
    arm = "Features\t: fp asimd asimddp sve\n\nFeatures\t: fp asimd asimddp\n"
    assert linux_features(arm) == ("asimd", "asimddp")
    assert linux_features("flags : fpu sse\n") == ()
    assert linux_features("processor : 0\n") is None


def test_cpu_features_of_macos() -> None:
    apple = "hw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_SME: 0\nhw.optional.AdvSIMD: 1\n"
    assert mac_features(apple) == ("asimd", "bf16")
    intel = "machdep.cpu.features: FPU AVX1.0 F16C FMA\nmachdep.cpu.leaf7_features: AVX2 AVX512F AVX512VNNI\n"
    assert mac_features(intel) == ("avx", "avx2", "avx512_vnni", "avx512f", "f16c", "fma")
    assert mac_features("") is None


@pytest.mark.skipif(sys.platform != "linux", reason="compares with what the kernel tells")
def test_the_features_of_this_processor_are_those_that_torch_finds() -> None:
    found = cpu_features()
    assert found is not None
    assert ("avx2" in found) == torch.cpu._is_avx2_supported()
    assert ("avx512_bf16" in found) == torch.cpu._is_avx512_bf16_supported()


def test_this_machine() -> None:
    profile = probe(quick=True)
    assert profile.gflops is None
    assert 1 <= profile.threads <= profile.cores <= (psutil.cpu_count() or 1)
    assert profile.memory_available_bytes is not None
    assert 0 < profile.memory_available_bytes <= profile.memory_total_bytes <= psutil.virtual_memory().total
    assert profile.swap_total_bytes is not None
    assert profile.swap_free_bytes is not None
    assert 0 <= profile.swap_free_bytes <= profile.swap_total_bytes <= psutil.swap_memory().total
    assert profile.trainable_memory_bytes() > 0
    best = {"mps": "mps", "cuda": "cuda", "xpu": "xpu"}.get(torch_device.torch_device().type)
    assert (profile.accelerator.kind if profile.accelerator else None) == best
    assert (profile.gemm_dtype == "bfloat16") == (
        torch_device.compute_dtype(torch_device.torch_device()) == torch.bfloat16
    )


def test_the_disk_is_that_of_the_folder(tmp_path: Path) -> None:
    assert existing(tmp_path / "not" / "yet") == tmp_path
    (tmp_path / "file").touch()
    assert existing(tmp_path / "file") == tmp_path
    total = psutil.disk_usage(str(tmp_path)).total
    free = probe(quick=True, folder=tmp_path / "not" / "yet").disk_free_bytes
    assert free is not None
    assert 0 < free <= total
    if Path("/dev/shm").is_dir():
        elsewhere = probe(quick=True, folder=Path("/dev/shm")).disk_free_bytes
        assert elsewhere is not None
        assert elsewhere <= psutil.disk_usage("/dev/shm").total


def test_the_product_is_timed_and_leaves_no_trace() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    rate = torch_device.measure_gflops(torch.device("cpu"), threads=2)
    assert rate is not None
    assert rate > 0.01
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_product_for_which_there_is_no_memory_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: torch.device, size: int) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch_device, "_products_per_s", full)
    assert torch_device.measure_gflops(torch.device("cpu"), threads=1) is None


@pytest.mark.parametrize("name", ["quantum", "cuda:99", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=f"device {name!r} is not available here; use auto or cpu"):
        torch_device.torch_device(name)


class Cards:
    """What torch.cuda answers on a machine with two cards, the second held by another process."""

    asked: list[int]

    def __init__(self) -> None:
        self.asked = []

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(
            name=f"card {index}", total_memory=1000, major=8 - index, minor=6, is_integrated=0
        )

    def mem_get_info(self, index: int) -> tuple[int, int]:
        self.asked.append(index)
        if index == 1:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")
        return 900, 1000

    def is_available(self) -> bool:
        return True


def test_every_card_is_listed_the_first_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards()
    monkeypatch.setattr(torch, "cuda", cards)
    found = torch_device.accelerators()
    assert found == (
        Accelerator("cuda", "card 0", 1000, 900, compute_capability="8.6", bf16=True),
        Accelerator("cuda", "card 1", 1000, None, compute_capability="7.6", bf16=False),
    )
    assert cards.asked == [0, 1]
    cards.asked.clear()
    assert torch_device.accelerators(all_free=False) == found
    assert cards.asked == [0]  # asking opens a context of some hundred MB


def test_importing_the_probe_does_not_load_torch() -> None:
    code = "import sys, edge_sdk.machine.probe; assert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
