"""A problem whose right answer is known: matrix regression, every device on its own noisy copy of one target.

What is measured is the relative error ‖G − W‖ / ‖W‖ of the global matrix G.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_sdk.core.lora import LoraFactors, Matrix

DECAY = 0.8  # from one singular value of the target to the next
NOISE = 0.3  # of each device's copy, relative to the norm of the target


@dataclass(frozen=True)
class Problem:
    """The target W (width, width), of rank `rank`, with singular values 1, 0.8, 0.64 …, and its copies.

    `copies`: (devices, width, width). The mean of all of them is near the target; none of them is.
    """

    wanted: Matrix
    copies: Matrix

    @classmethod
    def drawn(cls, width: int, rank: int, devices: int, rng: np.random.Generator) -> Problem:
        """A target and a copy of it for each device."""
        u, _ = np.linalg.qr(rng.standard_normal((width, rank)))
        v, _ = np.linalg.qr(rng.standard_normal((width, rank)))
        wanted = (u * DECAY ** np.arange(rank)) @ v.T
        noise = rng.standard_normal((devices, width, width)) / width
        return cls(wanted, wanted + NOISE * np.linalg.norm(wanted) * noise)

    def error(self, found: LoraFactors) -> float:
        """The relative error of a global matrix."""
        return float(np.linalg.norm(found.product() - self.wanted) / np.linalg.norm(self.wanted))


@dataclass(frozen=True)
class Adam:
    """Steps of Adam as the trainer does them, with a rate that rises over the first `warm_up` steps."""

    steps: int
    learning_rate: float
    warm_up: int = 1

    def fit(self, b: Matrix, a: Matrix, wanted: Matrix) -> tuple[Matrix, Matrix]:
        """Descend on ½‖BA − W‖² from B and A.

        Args:
            b: (…, out, r). Leading axes are devices, each by itself.
            a: (…, r, in).
            wanted: W, (…, out, in).

        Returns:
            B and A in float32; the arithmetic is float64.
        """
        values = [b.astype(np.float64), a.astype(np.float64)]
        first, second = [np.zeros_like(v) for v in values], [np.zeros_like(v) for v in values]
        for step in range(1, self.steps + 1):
            left, right = values
            residual = left @ right - wanted
            gradients = (residual @ np.swapaxes(right, -1, -2), np.swapaxes(left, -1, -2) @ residual)
            rate = self.learning_rate * min(1.0, step / self.warm_up)
            for i, gradient in enumerate(gradients):
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.999 * second[i] + 0.001 * gradient**2
                direction = (first[i] / (1 - 0.9**step)) / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
                values[i] = values[i] - rate * direction
        return values[0].astype(np.float32), values[1].astype(np.float32)
