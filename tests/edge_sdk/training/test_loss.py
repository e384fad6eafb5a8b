"""The loss that overwrites its logits, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from edge_sdk.text.rows import IGNORED
from edge_sdk.training import loss


def both(
    dtype: torch.dtype, targets: list[int], chunk_values: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and gradients of the hidden states, ours and torch's."""
    monkeypatch.setattr(loss, "CHUNK_VALUES", chunk_values)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(targets), 6, generator=generator).to(dtype)
    head = torch.randn(11, 6, generator=generator).to(dtype)
    wanted = torch.tensor(targets)
    losses, gradients = [], []
    for ours in (True, False):
        leaf = hidden.clone().requires_grad_()
        logits = leaf @ head.T
        if ours:
            total = loss.summed_cross_entropy(logits, wanted)
        else:
            total = cross_entropy(logits.float(), wanted, reduction="sum", ignore_index=IGNORED)
        (total / 7).backward()
        losses.append(total.item())
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    return losses, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_values", [1, 22, 1 << 20])
def test_same_loss_and_gradient_as_torch(
    dtype: torch.dtype, chunk_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found, expected), (gradient, reference) = both(dtype, [3, IGNORED, 0, 10, 3], chunk_values, monkeypatch)
    assert found == pytest.approx(expected, rel=1e-6)
    one_rounding = 2**-8 * reference.abs().max().item() if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=one_rounding)
    assert gradient[1].abs().max() == 0


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    total = loss.summed_cross_entropy(logits, torch.tensor([0, IGNORED]))
    assert total.item() == pytest.approx(0.693147, rel=1e-5)  # ln 2
    assert logits.tolist() == [[0.0, 0.0], [1.0, 1.0]]  # no gradient wanted: left as they were


def test_logits_that_an_earlier_operation_needs_are_noticed() -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    total = loss.summed_cross_entropy(torch.tanh(leaf), torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
