"""Other libraries' combination of LoRA adapters by SVD, in an environment that is thrown away afterwards.

peft: `add_weighted_adapter(combination_type="svd")`, which forms every adapter's dense update, adds them up
and takes torch's SVD in float32, by default with full matrices. chorus-fl: `FedExLoRA.aggregate`, which does
the same with the thin SVD and keeps the dense residual. Both are given what the coordinator is given.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.core.lora import LoraFactors

Addends = list[tuple[float, LoraFactors]]
PACKAGES = ("chorus-fl==0.1.0",)
KEPT = 64


def environment(folder: Path) -> Path:
    """Make a virtual environment with the packages; its interpreter. torch and peft are those of this one."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def peft_svd(addends: Addends) -> npt.NDArray[np.float32]:
    """Singular values of peft's combination, which leaves them in the columns of B."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    out, inp = addends[0][1].shape
    with torch.device("meta"):
        base = torch.nn.Sequential(torch.nn.Linear(inp, out, bias=False))
    base = base.to_empty(device="cpu")
    model: Any = None
    for number, (_, factors) in enumerate(addends):
        name = f"update-{number}"
        config = LoraConfig(r=factors.rank, lora_alpha=factors.rank, target_modules=["0"])
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model[0]
        layer.lora_A[name].weight.data = torch.from_numpy(factors.a)
        layer.lora_B[name].weight.data = torch.from_numpy(factors.b)
    names = [f"update-{number}" for number in range(len(addends))]
    weights = [weight for weight, _ in addends]
    model.add_weighted_adapter(names, weights, "merged", combination_type="svd", svd_rank=min(KEPT, out, inp))
    merged: npt.NDArray[np.float32] = layer.lora_B["merged"].weight.detach().numpy()
    return np.linalg.norm(merged, axis=0)


def chorus_svd(addends: Addends) -> npt.NDArray[np.float32]:
    """Singular values of chorus-fl's combination, likewise in B."""
    import torch
    from chorus.server.aggregation import FedExLoRA

    torch.set_num_threads(1)
    key = "base_model.model.layer.{}.weight"
    deltas = [
        {key.format("lora_A"): torch.from_numpy(f.a), key.format("lora_B"): torch.from_numpy(f.b)}
        for _, f in addends
    ]
    merged = FedExLoRA(output_rank=KEPT).aggregate(deltas, [weight for weight, _ in addends])
    return np.linalg.norm(merged[key.format("lora_B")].numpy(), axis=0)
