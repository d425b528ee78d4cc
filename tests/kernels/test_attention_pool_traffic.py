"""Attention pooling asks memory for little more than its two launches must, and for nothing that is not its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smt_kernels import WindowSpec

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]

WINDOW = WindowSpec()


def count_sequence(n_writes: int, width: int, *, with_slots: bool, dtype: torch.dtype = torch.bfloat16, batch: int = 1):
    """Traffic of forward and backward over a sequence, and the tensors of both by name."""
    from smt_kernels.attention_pool import kernels
    from smt_kernels.testing.traffic import count_traffic

    first_write, group = 24, 8
    n_slots = WINDOW.pooled_slots(first_write + n_writes - 1, group)[1] - WINDOW.pooled_slots(first_write, group)[0]
    tokens = torch.randn(batch, WINDOW.n_tokens + WINDOW.stride * (n_writes - 1), width).to(dtype)
    slots = torch.randn(batch, n_slots, width).to(dtype) if with_slots else None
    w_q, w_k = torch.randn(2, 24, width).to(dtype)
    first_step = WINDOW.visible_tokens(WINDOW.write_step(first_write))[0]
    timeline = first_write, n_writes, group, first_step, WINDOW.pooled_slots(first_write, group)[0]
    with count_traffic() as forward:
        pooled, *kept = kernels.forward_sequence(tokens, slots, w_q, w_k, None, WINDOW, timeline, True)
    grad = torch.randn_like(pooled)
    with count_traffic() as backward:
        kernels.backward_sequence(grad, None, tokens, slots, w_q, w_k, None, *kept, WINDOW, timeline, True)
    inputs = {"tokens": tokens, "w_q": w_q, "w_k": w_k} | ({"slots": slots} if with_slots else {})
    return forward, backward, inputs, dict(zip(("pooled", "weights", "mean", "query", "u"), (pooled, *kept), strict=True))


def size(tensors: dict[str, Tensor], *names: str) -> int:
    return sum(tensors[name].nbytes for name in names if name in tensors)


@pytest.mark.parametrize("with_slots", [True, False], ids=["with slots", "tokens only"])
@pytest.mark.parametrize("n_writes", [8, 40], ids=["one group", "a long call"])
def test_a_sequence_is_read_little_more_than_once_by_each_launch(n_writes, with_slots):
    """u depends on the mean of all entries, so that without the matrix products in a kernel both launches must read them."""
    forward, backward, inputs, outputs = count_sequence(n_writes, 256, with_slots=with_slots)
    entries = size(inputs, "tokens", "slots")
    least_forward = 2 * entries + size(outputs, "mean", "u", "pooled", "weights")
    # dpooled and the weights are read twice, by both launches; du, dmean and dweights are as large as u, u and the weights.
    least_backward = 3 * entries + size(outputs, "pooled", "pooled", "u", "u", "u", *["weights"] * 4)
    assert forward.bytes <= 1.25 * least_forward
    assert backward.bytes <= 1.4 * least_backward
    # What one fused launch with the matrix products inside it would move, which nobody has written.
    strictly_least = size(inputs, "tokens", "slots", "w_q", "w_k") + size(outputs, "pooled", "weights")
    assert forward.bytes <= 2.5 * strictly_least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_single_windows_are_read_once_by_each_launch(dtype):
    from smt_kernels.attention_pool import kernels
    from smt_kernels.testing.traffic import count_traffic

    windows, (w_q, w_k) = torch.randn(3, 65, 256).to(dtype), torch.randn(2, 24, 256).to(dtype)
    with count_traffic() as forward:
        pooled, weights, mean, _, u = kernels.forward(windows, w_q, w_k, None, None, True)
    least = 2 * windows.nbytes + pooled.nbytes + weights.nbytes + mean.nbytes + u.nbytes
    assert forward.bytes <= 1.1 * least


def test_a_width_of_768_is_read_by_one_program_forward():
    forward, _, inputs, outputs = count_sequence(8, 768, with_slots=True)
    least = 2 * size(inputs, "tokens", "slots") + size(outputs, "mean", "u", "pooled", "weights")
    assert forward.bytes <= 1.1 * least


@pytest.mark.parametrize(
    ("n_writes", "width", "dtype", "batch"),
    [(1, 24, torch.float32, 2), (19, 40, torch.float32, 1), (3, 300, torch.float32, 1), (2, 1100, torch.bfloat16, 1)],
    ids=["one write", "two strips", "two chunks of fp32", "chunks of bf16"],
)
@pytest.mark.parametrize("with_slots", [True, False], ids=["with slots", "tokens only"])
def test_no_program_leaves_its_tensors_or_meets_another(with_slots, n_writes, width, dtype, batch):
    forward, backward, *_ = count_sequence(n_writes, width, with_slots=with_slots, dtype=dtype, batch=batch)
    for traffic in (forward, backward):
        assert not traffic.raced and not traffic.atomics
        assert len(traffic.launches) == 2
