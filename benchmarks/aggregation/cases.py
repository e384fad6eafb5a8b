"""What is aggregated: the modules of LLaMA-7B, mixes of ranks, updates with the spread of trained ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coordinator.merging.sources import Addend
from edge_sdk.core.adapter_file.codec import encode_chunks
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Base, Federation, Training

Shape = tuple[int, int]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MIXED = (8, 8, 8, 8, 30, 30, 30, 64, 64, 64)
KEPT = 64
SCALING = 2.0


@dataclass(frozen=True)
class Model:
    """Layers of a LLaMA: `width` in and out of attention, `hidden` inside the feed-forward part."""

    name: str
    width: int
    hidden: int
    layers: int

    def shapes(self) -> dict[str, Shape]:
        """Module name -> (out, in)."""
        shapes: dict[str, Shape] = {}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= {f"{at}.self_attn.{name}": (self.width, self.width) for name in ATTENTION}
            shapes |= {f"{at}.mlp.{name}": (self.hidden, self.width) for name in ("gate_proj", "up_proj")}
            shapes[f"{at}.mlp.down_proj"] = (self.width, self.hidden)
        return shapes

    def counts(self) -> dict[Shape, int]:
        """How many modules have each shape."""
        return {
            (self.width, self.width): 4 * self.layers,
            (self.hidden, self.width): 2 * self.layers,
            (self.width, self.hidden): self.layers,
        }


LLAMA_7B = Model("LLaMA-7B", 4096, 11008, 32)
SMALL = Model("an eighth of LLaMA-7B's width, 8 layers", 512, 1376, 8)


@dataclass(frozen=True)
class Mix:
    """The ranks of K updates: of attention modules, and of feed-forward ones where the paper has others."""

    name: str
    attention: tuple[int, ...]
    feed_forward: tuple[int, ...] = ()

    def ranks(self, shape: Shape) -> tuple[int, ...]:
        """Of a module of this shape, none above what it can hold."""
        chosen = self.attention if shape[0] == shape[1] else self.feed_forward or self.attention
        return tuple(min(rank, *shape) for rank in chosen)


# The paper's device types (arXiv:2402.11505): rank 8; 30; 30 in attention and 200 elsewhere; 200.
MIXES = (
    Mix("4×8, 3×30, 3×64", MIXED),
    Mix("paper's types, 3 each", (8,) * 3 + (30,) * 6 + (200,) * 3, (8,) * 3 + (30,) * 3 + (200,) * 6),
    Mix("10×200", (200,) * 10),
    Mix("20×200", (200,) * 20),
)


def update(shape: Shape, rank: int, rng: np.random.Generator) -> LoraFactors:
    """Factors whose components fall by a tenth from one to the next, as trained ones fall rather than not."""
    b = rng.standard_normal((shape[0], rank), dtype=np.float32)
    b *= (0.9 ** np.arange(rank)).astype(np.float32)
    return LoraFactors(b, rng.standard_normal((rank, shape[1]), dtype=np.float32))


def updates(shape: Shape, ranks: Sequence[int], seed: int = 0) -> list[tuple[float, LoraFactors]]:
    """Equally weighted updates of one module."""
    rng = np.random.default_rng(seed)
    return [(1 / len(ranks), update(shape, rank, rng)) for rank in ranks]


def federation(model: Model) -> Federation:
    """A federation of that model under the published rule: its sum is what the dense reference forms."""
    base = Base(model.name, "ab" * 32, model.shapes())
    return Federation("benchmark", base, "flexlora", (8, 30, 64), KEPT, SCALING, "sigma_in_b", Training())


def write_updates(model: Model, ranks: Sequence[int], folder: Path) -> list[Addend]:
    """Files as devices upload them, and their addends."""
    shapes = model.shapes()
    addends = []
    for number, rank in enumerate(ranks):
        path = folder / f"update-{number}.safetensors"
        rng = np.random.default_rng(number)
        own = {name: min(rank, *shape) for name, shape in shapes.items()}

        modules = ((name, update(shapes[name], own[name], rng)) for name in sorted(own))
        with path.open("wb") as file:
            file.writelines(encode_chunks(shapes, own, SCALING, modules))
        addends.append(Addend(f"update-{number}", 1 / len(ranks), path, rank))
    (folder / "ranks.json").write_text(json.dumps(list(ranks)))
    return addends
