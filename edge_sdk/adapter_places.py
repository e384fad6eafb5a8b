"""The places of LoRA adapters in one PEFT model: put in, active together, read back, taken out.

The base model stays as it is. Adapters are folded (`b = s·B`) outside and PEFT's inside: `lora_B = b / s`
with `lora_alpha = s·r`, and `min(r, out, in)` components in a module narrower than r.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from edge_sdk.base_model import LoadedBase
from edge_sdk.core.carried import CarriedDtype
from edge_sdk.core.codec import Shapes, peft_config
from edge_sdk.core.errors import AdapterError
from edge_sdk.core.flexlora import pad
from edge_sdk.core.lora import Adapter, LoraFactors, Matrix, max_rank
from edge_sdk.frozen_factors import FrozenFactor

LOCAL, CARRIED = "local", "carried"  # trained, and held frozen


class AdapterPlaces:
    """LoRA layers around the target modules of a base model, which they take over for good.

    Args:
        base: the frozen model.
        shapes: target module -> (out, in).
        scaling: s, the same at every rank.
    """

    def __init__(self, base: LoadedBase, shapes: Shapes, scaling: float) -> None:
        self._base, self._shapes, self._scaling = base, dict(shapes), scaling
        with _without_peft_notices():
            from peft import get_peft_model

            config = self._config(1)
            self._peft = get_peft_model(base.model, config, adapter_name=LOCAL, low_cpu_mem_usage=True)
        self._remove(LOCAL)

    @contextmanager
    def installed(
        self, adapters: Mapping[str, Adapter | None], carried_dtype: CarriedDtype = "float32"
    ) -> Iterator[None]:
        """Put adapters in their places, all active, with gradients for LOCAL alone; take them out after.

        CARRIED is held in `carried_dtype`.
        """
        present = {name: adapter for name, adapter in adapters.items() if adapter and max_rank(adapter)}
        try:
            for name, adapter in present.items():
                self._install(name, adapter, carried_dtype if name == CARRIED else "float32")
            self._peft.base_model.set_adapter(list(present), inference_mode=True)
            if LOCAL in present:
                self._peft.base_model.set_requires_grad(LOCAL, requires_grad=True)
            yield
        finally:
            for name in present:
                self._remove(name)

    def _install(self, name: str, adapter: Adapter, held: CarriedDtype = "float32") -> None:
        """Add an adapter under `name`. A module with fewer components than the rest is padded."""
        self.check(adapter)
        rank = max_rank(adapter)
        with _without_peft_notices():
            self._peft.add_adapter(name, self._config(rank), low_cpu_mem_usage=True)
        for module, shape in self._shapes.items():
            full = pad(adapter[module], min(rank, *shape), f"{name}/{module}")
            a, b = self._parameter(full.a), self._parameter(full.b / np.float32(self._scaling))
            if held == "float32":
                places = self._weights(module, name)
                places[0].weight, places[1].weight = a, b
                continue
            layer, compute = self._base.model.get_submodule(module), self._base.model.dtype
            layer.lora_A[name] = FrozenFactor(a, held, compute, components=0)
            layer.lora_B[name] = FrozenFactor(b, held, compute, components=1)

    def _remove(self, name: str) -> None:
        """Delete an adapter, which must not be active at that moment, or PEFT warns that it picks another."""
        self._peft.base_model.set_adapter([])
        if name in self._peft.peft_config:
            self._peft.base_model.delete_adapter(name)

    def _weights(self, module: str, name: str) -> tuple[Any, Any]:
        """The A and B layers of `module` in the adapter `name`."""
        layer = self._base.model.get_submodule(module)
        return layer.lora_A[name], layer.lora_B[name]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """`{module}.a` and `{module}.b` -> parameter of LOCAL, in a stable order."""
        found = {}
        for module in sorted(self._shapes):
            a, b = self._weights(module, LOCAL)
            found[f"{module}.a"], found[f"{module}.b"] = a.weight, b.weight
        return found

    def factors(self, name: str) -> dict[str, LoraFactors]:
        """Copies of an adapter's factors, folded; of packed ones, what they unpack to."""
        adapter = {}
        for module in self._shapes:
            a, b = (_values(layer).cpu().numpy() for layer in self._weights(module, name))
            adapter[module] = LoraFactors(b * np.float32(self._scaling), a.copy())
        return adapter

    def check(self, adapter: Adapter, rank: int | None = None) -> None:
        """Raise AdapterError unless an adapter holds exactly the target modules, none above `rank`."""
        for module in sorted(set(self._shapes) ^ set(adapter)):
            raise AdapterError(
                f"module {module} is {'missing' if module in self._shapes else 'no target here'}"
            )
        for module, shape in self._shapes.items():
            if adapter[module].shape != shape:
                raise AdapterError(f"module {module} has shape {adapter[module].shape}, expected {shape}")
            most = min(shape) if rank is None else min(rank, *shape)
            if adapter[module].rank > most:
                raise AdapterError(f"module {module} has rank {adapter[module].rank}, more than {most}")

    def _config(self, rank: int) -> Any:
        """What an exported adapter of `rank` has as PEFT configuration, and `fan_in_fan_out`."""
        from peft import LoraConfig  # imports bitsandbytes, which base_model.load has done quietly

        settings = peft_config("", self._shapes, rank, self._scaling)
        del settings["peft_type"], settings["base_model_name_or_path"]
        return LoraConfig(**settings, fan_in_fan_out=self._base.fan_in_fan_out)

    def _parameter(self, values: Matrix) -> torch.nn.Parameter:
        """Factors are held and trained in float32, whatever the base computes in."""
        tensor = torch.tensor(np.asarray(values, dtype=np.float32), device=self._base.device)
        return torch.nn.Parameter(tensor, requires_grad=False)


def _values(layer: Any) -> torch.Tensor:
    """What an A or B layer multiplies with, in float32."""
    if isinstance(layer, FrozenFactor):
        return layer.dense(torch.float32)
    values: torch.Tensor = layer.weight.detach()
    return values


@contextmanager
def _without_peft_notices() -> Iterator[None]:
    """PEFT reads an attribute that transformers has renamed; the notice is for PEFT, not for our callers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
