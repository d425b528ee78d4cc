"""Window attention asks memory and matrix units for little more than it must, and for nothing that is not its own."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]


def count(window: int, n_queries: int, heads: int = 2, kv_heads: int = 2, head_dim: int = 64, *, fused: bool = False):
    """Traffic of forward and backward, with the smallest number of bytes each can move."""
    from smt_kernels.testing.traffic import count_traffic
    from smt_kernels.window_attention import kernels

    if fused:
        q, k, v = torch.randn(2, window, heads + 2 * kv_heads, head_dim).bfloat16().split([heads, kv_heads, kv_heads], dim=2)
        q = q[:, -n_queries:]
    else:
        q = torch.randn(2, n_queries, heads, head_dim).bfloat16()
        k, v = torch.randn(2, 2, window, kv_heads, head_dim).bfloat16()
    valid_memory, valid_tokens = torch.tensor([[3, 15], [20, window - 15]], dtype=torch.int32)
    rest = valid_memory, valid_tokens, 15, head_dim**-0.5
    with count_traffic() as forward:
        out, lse = kernels.forward(q, k, v, *rest)
    grad = torch.randn_like(q)
    with count_traffic() as backward:
        dq, dk, dv = kernels.backward(grad, q, k, v, out, lse, *rest)
    counts = valid_memory.nbytes + valid_tokens.nbytes
    least_forward = sum(x.nbytes for x in (q, k, v, out, lse)) + counts
    least_backward = sum(x.nbytes for x in (grad, q, k, v, out, lse, dq, dk, dv)) + counts
    return forward, least_forward, backward, least_backward


def test_the_window_of_65_is_read_and_written_once():
    forward, least_forward, backward, least_backward = count(65, 65)
    assert forward.bytes <= 1.1 * least_forward
    assert backward.bytes <= 2 * least_backward


def test_query_heads_that_share_keys_read_them_once():
    forward, least_forward, backward, least_backward = count(65, 16, heads=4, kv_heads=1)
    assert forward.bytes <= 1.1 * least_forward
    assert backward.bytes <= 2 * least_backward


@pytest.mark.parametrize("n_queries", [65, 50, 16], ids="T{}".format)
def test_the_window_of_65_multiplies_at_most_three_times_what_is_visible(n_queries):
    forward, _, backward, _ = count(65, n_queries)
    visible = 2 * 2 * sum(range(65 - n_queries + 1, 66))  # windows, heads, (query, key) pairs
    assert forward.dot_flops <= 3 * (2 * 2 * 64 * visible)
    assert backward.dot_flops <= 3 * (5 * 2 * 64 * visible)


@pytest.mark.parametrize(
    "sizes",
    [(65, 65), (65, 16), (50, 50), (66, 65), (128, 1), (127, 127, 2, 1, 40), (65, 65, 1, 1, 256)],
    ids=lambda sizes: "-".join(f"{letter}{size}" for letter, size in zip(["W", "T", "H", "K", "D"], sizes, strict=False)),
)
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused projection"])
def test_no_program_leaves_its_tensors_or_meets_another(sizes, fused):
    forward, _, backward, _ = count(*sizes, fused=fused)
    for traffic in (forward, backward):
        assert not traffic.raced and not traffic.atomics
        assert len(traffic.launches) == 1
