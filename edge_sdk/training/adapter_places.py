"""The places of LoRA adapters in one PEFT model: put in, active together, read back, taken out.

The base model stays as it is. Adapters are folded (`b = s·B`) outside and PEFT's inside: `lora_B = b / s`
with `lora_alpha = s·r`. Every module has the rank of its own factors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from edge_sdk.core.adapter_file.codec import Shapes, peft_config
from edge_sdk.core.choice.carried import CarriedDtype
from edge_sdk.core.errors import AdapterError, InternalError
from edge_sdk.core.flexlora import pad
from edge_sdk.core.lora import Adapter, LoraFactors, Matrix, max_rank
from edge_sdk.model.base_model import LoadedBase
from edge_sdk.training.factor_layers import FrozenFactor, TrainedFactor
from edge_sdk.training.fair_lock import FairLock

LOCAL, CARRIED, ANSWERING = "local", "carried", "answering"  # trained; held frozen under it; asked by people


class AdapterPlaces:
    """LoRA layers around the target modules of a base model, which they take over for good.

    Args:
        base: the frozen model.
        shapes: target module -> (out, in).
        scaling: s, the same at every rank.
        lock: whoever uses the model holds it; the places change only while it is held.
    """

    def __init__(
        self, base: LoadedBase, shapes: Shapes, scaling: float, lock: FairLock | None = None
    ) -> None:
        self._base, self._shapes, self._scaling = base, dict(shapes), scaling
        self._lock = lock or FairLock()
        self._active: list[str] = []
        with _without_peft_notices():
            from peft import get_peft_model

            config = self._config(dict.fromkeys(shapes, 1))
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
        with self._lock:  # an answer in hand ends first
            if self._active:
                raise InternalError(f"the model is busy with {', '.join(self._active)}; one run at a time")
        try:
            with self._lock:
                for name, adapter in present.items():
                    self._install(name, adapter, carried_dtype if name == CARRIED else "float32")
                self._activate(list(present))
            yield
        finally:
            with self._lock:
                for name in present:
                    self._remove(name)
                self._activate([])

    def answer_with(self, adapter: Adapter | None) -> None:
        """Put `adapter` (None: the base alone) in ANSWERING, in place of what was there; see `answering`."""
        with self._lock:
            active = self._active
            try:
                self._remove(ANSWERING)
                if adapter and max_rank(adapter):
                    self._install(ANSWERING, adapter)
            finally:
                self._activate(active)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """One turn with ANSWERING alone; after it all is as before, for a training run in the middle too."""
        with self._lock:
            active = self._active
            self._activate([ANSWERING] if ANSWERING in self._peft.peft_config else [])
            try:
                yield
            finally:
                self._activate(active)

    def _activate(self, names: list[str]) -> None:
        """Make these adapters count, summed in this order, with gradients for LOCAL alone."""
        self._peft.base_model.set_adapter(names, inference_mode=True)
        if LOCAL in names:
            self._peft.base_model.set_requires_grad(LOCAL, requires_grad=True)
        self._active = names

    def _install(self, name: str, adapter: Adapter, held: CarriedDtype = "float32") -> None:
        """Add an adapter under `name`. PEFT needs a component: a module without gets a dead one."""
        self.check(adapter)
        ranks = {module: max(1, adapter[module].rank) for module in self._shapes}
        with _without_peft_notices():
            self._peft.add_adapter(name, self._config(ranks), low_cpu_mem_usage=True)
        for module, rank in ranks.items():
            full = pad(adapter[module], rank, f"{name}/{module}")
            a, b = self._parameter(full.a), self._parameter(full.b / np.float32(self._scaling))
            layer, compute = self._base.model.get_submodule(module), self._base.model.dtype
            layer.cast_input_dtype_enabled = False  # the factors do it; see factor_layers
            if held == "float32":
                layer.lora_A[name], layer.lora_B[name] = TrainedFactor(a), TrainedFactor(b)
            else:
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

    def check(self, adapter: Adapter, ranks: Mapping[str, int] | None = None) -> None:
        """Raise AdapterError unless an adapter holds exactly the target modules, none above its rank."""
        for module in sorted(set(self._shapes) ^ set(adapter)):
            raise AdapterError(
                f"module {module} is {'missing' if module in self._shapes else 'no target here'}"
            )
        for module, shape in self._shapes.items():
            if adapter[module].shape != shape:
                raise AdapterError(f"module {module} has shape {adapter[module].shape}, expected {shape}")
            most = min(shape) if ranks is None else ranks[module]
            if adapter[module].rank > most:
                raise AdapterError(f"module {module} has rank {adapter[module].rank}, more than {most}")

    def _config(self, ranks: Mapping[str, int]) -> Any:
        """What an exported adapter of these ranks has as PEFT configuration, and `fan_in_fan_out`."""
        from peft import LoraConfig  # imports bitsandbytes, which base_model.load has done quietly

        widths = {module: (rank, rank) for module, rank in ranks.items()}  # a narrow module bounds its rank
        settings = peft_config("", widths, max(ranks.values()), self._scaling)
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
