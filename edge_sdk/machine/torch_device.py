"""The torch device that would train, the dtype that it computes in, and what torch knows of accelerators.

One rule for the loader, the probe, the 4-bit trial and the doctor; importing this imports nothing but torch.
CUDA, MPS and XPU follow torch's documentation; only the CPU was measured.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from edge_sdk.core.errors import InputError
from edge_sdk.core.profile import Accelerator, GemmDtype

CPU_GEMM_SIZE, ACCELERATOR_GEMM_SIZE = 1024, 4096
WARM_UP_S, GEMM_S = 0.05, 0.3


def torch_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is the first of MPS, CUDA and XPU that torch has, else the CPU.

    Raises:
        InputError: torch has no such device here.
    """
    if name == "auto":
        return torch.device(_best())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} is not available here; use auto or cpu") from error
    return device


def _best() -> str:
    if torch.backends.mps.is_available():
        return "mps"
    if torch.cuda.is_available():
        return "cuda"
    return "xpu" if torch.xpu.is_available() else "cpu"


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32.

    NF4 training of `tiny` (8 rows of 96 tokens, one thread, AVX512-BF16) took 214 ms a step in bfloat16,
    340 ms in float32, 234 ms with bfloat16 products in a float32 model; unquantised 199 and 321 ms. Without
    the instruction bfloat16 is emulated and slower than float32. float16 is never chosen: its gradients
    underflow without loss scaling.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return torch.float32


def dtype_name(device: torch.device) -> GemmDtype:
    """`compute_dtype` as a profile writes it."""
    return "bfloat16" if compute_dtype(device) == torch.bfloat16 else "float32"


def accelerators(all_free: bool = True) -> tuple[Accelerator, ...]:
    """Every accelerator that torch can use, the one that `auto` takes first.

    Args:
        all_free: ask each CUDA and XPU device for its free memory. That opens a context of some hundred MB on
            it for the life of the process; otherwise only the first is asked.
    """
    found: list[Accelerator] = []
    if torch.backends.mps.is_available():
        found.append(_mps())
    if torch.cuda.is_available():
        found += [_cuda(index, all_free or not (found or index)) for index in _range(torch.cuda)]
    if torch.xpu.is_available():
        found += [_xpu(index, all_free or not (found or index)) for index in _range(torch.xpu)]
    return tuple(found)


def _range(backend: Any) -> range:
    """Indices of a backend's devices."""
    return range(backend.device_count())


def _cuda(index: int, ask_free: bool) -> Accelerator:
    """One CUDA (or ROCm) device. `gfx` numbers of AMD are no compute capability."""
    properties = torch.cuda.get_device_properties(index)
    native = torch.version.hip is not None or properties.major >= 8  # Ampere brought bfloat16
    return Accelerator(
        kind="cuda",
        name=properties.name,
        memory_total_bytes=properties.total_memory,
        memory_free_bytes=_free_bytes(torch.cuda, index) if ask_free else None,
        shared=bool(getattr(properties, "is_integrated", False)),
        compute_capability=None if torch.version.hip else f"{properties.major}.{properties.minor}",
        bf16=native,
    )


def _mps() -> Accelerator:
    """Apple's GPU: what Metal recommends of the shared memory, and bfloat16 from macOS 14 on."""
    total = torch.mps.recommended_max_memory()
    free = max(0, total - torch.mps.driver_allocated_memory())
    bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
    return Accelerator("mps", "Apple GPU", total, free, shared=True, bf16=bf16)


def _xpu(index: int, ask_free: bool) -> Accelerator:
    """One Intel GPU."""
    properties = torch.xpu.get_device_properties(index)
    free = _free_bytes(torch.xpu, index) if ask_free else None
    shared = bool(getattr(properties, "is_integrated_gpu", False))
    return Accelerator("xpu", properties.name, properties.total_memory, free, shared)


def _free_bytes(backend: Any, index: int) -> int | None:
    """Free memory; None where the device refuses another process (exclusive mode) or has no room for one."""
    try:
        return int(backend.mem_get_info(index)[0])
    except RuntimeError:
        return None


def measure_gflops(device: torch.device, threads: int) -> float | None:
    """Billions of floating-point operations a second that `device` sustains in `compute_dtype`.

    A square matrix product, over and over for 0.3 s after a warm-up: the mean, not the best. On a CPU it runs
    on `threads` threads, and the process's own number is put back. None where there is no memory for it.
    """
    size = CPU_GEMM_SIZE if device.type == "cpu" else ACCELERATOR_GEMM_SIZE
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rate = _products_per_s(device, size)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.set_num_threads(before)
    return float(f"{2 * size**3 * rate / 1e9:.4g}")


def _products_per_s(device: torch.device, size: int) -> float:
    """Matrix products of two (size, size) matrices a second."""
    generator = torch.Generator(device).manual_seed(0)  # the application's random numbers stay as they are
    with torch.no_grad():
        a = torch.randn(size, size, device=device, generator=generator).to(compute_dtype(device))
        out = torch.empty_like(a)
        for limit_s in (WARM_UP_S, GEMM_S):
            count, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < limit_s or not count:
                torch.mm(a, a, out=out)
                _synchronise(device)
                count += 1
    return count / elapsed


def _synchronise(device: torch.device) -> None:
    """Wait for what a device was given to do; a CPU has done it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
