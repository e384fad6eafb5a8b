"""The decomposition of a stack on an accelerator, by torch, where the host asks for it (`--device cuda`).

QR of both stacks and the SVD of the core, all in float64; from R = min(out, in) on, the SVD of the dense sum.
Both are orthogonal transformations, exact without a check. Factors go to the device as float32 and are
widened there. torch is imported when a device is asked for: a host without it aggregates by numpy.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sdk.core.errors import InputError, first_line
from edge_sdk.core.flexlora import Decompose
from edge_sdk.core.svd.decompose import decompose
from edge_sdk.core.svd.stack import Stack, Wide
from edge_sdk.core.svd.triplets import Triplets

if TYPE_CHECKING:
    import torch


def decompose_on(device: str) -> Decompose:
    """How to decompose stacks on a device: `cpu` is numpy, `cuda` or `cuda:1` torch.

    Raises:
        InputError: torch is not installed, or has no such device.
    """
    if device == "cpu":
        return decompose
    if importlib.util.find_spec("torch") is None:
        raise InputError(f"--device {device} needs torch; install it, or leave --device out")
    import torch

    try:
        torch.zeros(1, device=device, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"--device {device} cannot be used ({first_line(error)}); leave --device out"
        ) from error
    return lambda stack, rank: torch_decompose(stack, rank, device)


def torch_decompose(stack: Stack, rank: int, device: str) -> Triplets:
    """The leading min(rank, R) singular triplets; as `svd.decompose`.

    Raises:
        AdapterError: a value is not finite.
    """
    import torch

    stack.require_finite()
    kept = min(rank, stack.rank)
    b = torch.cat([_widened(part.b, device) for part in stack.parts], dim=1)
    b *= torch.from_numpy(stack.weights).to(device)
    a = torch.cat([_widened(part.a, device) for part in stack.parts], dim=0)
    if stack.rank >= min(stack.shape):
        u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
        u, vt = u[:, :kept], vt[:kept]
    else:
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vt = torch.linalg.svd(r_b @ r_a.T)
        u, vt = q_b @ u[:, :kept], vt[:kept] @ q_a.T
    sigmas = _numpy(s)
    return Triplets(
        _numpy(u), sigmas, _numpy(vt), float(sigmas @ sigmas), float(sigmas[kept:] @ sigmas[kept:])
    )


def _widened(factor: Any, device: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(factor)).to(device).double()


def _numpy(tensor: torch.Tensor) -> Wide:
    array: Wide = tensor.cpu().numpy()
    return array
