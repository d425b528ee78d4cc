"""Stream attention asks memory for little more than it must, and for nothing that is not its own.

Single heads in a long sequence have budgets of their own (``test_kernel_budgets.py``); here are shared ones and the edges.
"""

from __future__ import annotations

import pytest
import torch

from smt_kernels import WindowSpec, launch

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]


def count(
    n_queries: int,
    window: WindowSpec,
    *,
    history: int = 0,
    n_slots: int | None = None,
    heads: int = 1,
    kv_heads: int = 1,
    head_dim: int = 64,
    first_step: int = 0,
    first_slot: int = 0,
    fused: bool = False,
):
    """Traffic of forward and backward, with the smallest number of bytes each can move."""
    from smt_kernels.stream_attention import kernels
    from smt_kernels.testing.traffic import count_traffic

    n_keys = history + n_queries
    if n_slots is None:
        n_slots = window.writes_made(first_step + n_keys)
    if fused:
        q, k, v = torch.randn(1, n_keys, heads + 2 * kv_heads, head_dim).bfloat16().split([heads, kv_heads, kv_heads], dim=2)
        q = q[:, history:]
    else:
        q = torch.randn(1, n_queries, heads, head_dim).bfloat16()
        k, v = torch.randn(2, 1, n_keys, kv_heads, head_dim).bfloat16()
    memory_k, memory_v = torch.randn(2, 1, n_slots, kv_heads, head_dim).bfloat16()
    inputs = q, k, v, memory_k, memory_v
    settings = window, head_dim**-0.5, first_step, first_slot
    with count_traffic() as forward:
        out, lse = kernels.forward(*inputs, *settings)
    with count_traffic() as backward:
        kernels.backward(torch.randn_like(q), out, lse, *inputs, *settings)
    least = sum(x.nbytes for x in inputs) + out.nbytes + lse.nbytes
    return forward, least, backward, least + sum(x.nbytes for x in inputs) + out.nbytes


def test_heads_that_share_keys_read_them_once_forward_and_for_each_of_them_backward():
    """The backward limit is a measured one: the programs of 64 steps take one head after the other, and the keys with it."""
    settings = {"history": 64, "first_step": 256, "first_slot": 4, "n_slots": 47}
    forward, least_forward, backward, least_backward = count(512, WindowSpec(), heads=2, **settings)
    assert forward.bytes <= 1.6 * least_forward
    assert backward.bytes <= 2.7 * least_backward


@pytest.mark.parametrize(
    "settings",
    [
        {"n_queries": 1, "history": 60, "first_step": 200, "n_slots": 20},
        {"n_queries": 70, "window": WindowSpec(15, 50, 16), "history": 30, "first_step": -5, "first_slot": -2, "n_slots": 9},
        {"n_queries": 66, "heads": 3, "head_dim": 40},
        {"n_queries": 40, "window": WindowSpec(0, 50, None), "n_slots": 40, "heads": 2, "head_dim": 16},
        {"n_queries": 20, "n_slots": 0, "head_dim": 256},
    ],
    ids=["one query", "negative starts", "grouped heads", "static memory", "long head"],
)
@pytest.mark.parametrize("family", ["interpreter", "ampere"])  # whose gradients of queries and tokens have a launch each
def test_no_program_leaves_its_tensors_or_meets_another(family, settings, monkeypatch):
    monkeypatch.setattr(launch, "architecture_family", lambda device: family)
    forward, _, backward, _ = count(**{"window": WindowSpec()} | settings, fused=True)  # views of one projection
    for traffic in (forward, backward):
        assert not traffic.raced and not traffic.atomics
