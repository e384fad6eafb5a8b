"""What a training process takes before it holds anything of the model: measured, because nothing else tells.

Libraries load code and build caches at their first use, so that a process that has only imported them looks
too small. This one has trained: two steps of the embedded base, then everything was let go.
"""

from __future__ import annotations

import json
import sys

import torch

from edge_sdk.core.messages import Directive
from edge_sdk.model import base_model
from edge_sdk.system import process_memory
from edge_sdk.system.hidden_library import hide_bitsandbytes
from edge_sdk.text.rows import Tokenised
from edge_sdk.training.plan import Plan, Start, StepReport
from edge_sdk.training.trainer import Trainer

ROW = Tokenised(ids=tuple(range(5, 133)), labels=tuple(range(5, 133)))  # long enough for every kernel


def framework_bytes(device: str = "auto", quantise: bool = True) -> int:
    """Memory of this process after a training of no size, in the place where training will be.

    On an accelerator: what the libraries hold of its memory beside PyTorch's allocator (the context).
    """
    base = base_model.load("tiny", device=device, quantise=quantise)
    place = base.device
    trainer = Trainer(base, base_model.describe("tiny").modules, 1.0, progress=False)
    plan = Plan(steps=2, batch=1, micro_batch=1, sequence_len=len(ROW.ids), learning_rate=1e-3)
    trainer.train(Start(None, None, 1, 0), [ROW], plan, on_step=_go_on)
    del base, trainer
    base_model.release_memory()
    return context_bytes(place) if place.type == "cuda" else process_memory.resident_bytes()


def context_bytes(device: torch.device) -> int:
    """Memory of a CUDA device in use beside what PyTorch reserved: the context, and other programs."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def _go_on(_: StepReport) -> Directive:
    return "continue"


def main() -> int:
    """Measure this process, run as `python -m` this module `DEVICE 4-bit|whole`; the last line is JSON."""
    if sys.argv[2] == "whole":  # nothing here needs it, and where it is broken its import may end the process
        hide_bitsandbytes()
    sys.stdout.write(json.dumps({"bytes": framework_bytes(sys.argv[1], sys.argv[2] == "4-bit")}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
