"""What 4-bit layers of bitsandbytes need before they can be trained through. Imports no library at all.

The trial of 4-bit training uses it too, and must not wait for transformers.
"""

from __future__ import annotations

from typing import Any


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking weights for inference.

    On a CPU with AVX512-BF16 its Linear4bit repacks its weight in place on the first forward in evaluation
    mode whose input needs no gradient, and the packed product has no backward: training after one
    evaluation would silently lose the gradient through every layer. It also fails on out_features that are
    no multiple of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
