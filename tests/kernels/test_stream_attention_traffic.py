"""Stream attention asks memory and matrix units for little more than it must, and for nothing that is not its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from smt_kernels import WindowSpec, launch
from smt_kernels.stream_attention.settings import SEPARATE_FAMILIES

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


@pytest.fixture(scope="module", params=launch.FAMILIES[:-1])
def long_sequence(request: pytest.FixtureRequest) -> Iterator[tuple]:
    """512 steps in the middle of a stream of the default window, with the launch settings of each architecture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "architecture_family", lambda device: request.param)
        yield request.param, *count(512, WindowSpec(), history=64, first_step=256, first_slot=4, n_slots=47)


def test_the_forward_pass_moves_at_most_1_6_times_the_least(long_sequence):
    _, forward, least, _, _ = long_sequence
    assert forward.bytes <= 1.6 * least


def test_the_backward_pass_moves_at_most_twice_the_least_where_its_registers_allow(long_sequence):
    """Ampere's do not hold queries and tokens together without spills: two launches, which both read q, dO, k and v."""
    family, _, _, backward, least = long_sequence
    assert backward.bytes <= (2.25 if family in SEPARATE_FAMILIES else 2) * least


@pytest.mark.parametrize("heads, backward_limit", [(2, 2.7), (4, 3.1)], ids=["2 heads per key head", "4 heads per key head"])
def test_heads_that_share_keys_read_them_once_forward_and_for_each_of_them_backward(heads, backward_limit):
    """Backward limits are measured ones: the programs of 64 steps take one head after the other, and the keys with it."""
    settings = {"history": 64, "first_step": 256, "first_slot": 4, "n_slots": 47}
    forward, least_forward, backward, least_backward = count(512, WindowSpec(), heads=heads, **settings)
    assert forward.bytes <= 1.6 * least_forward
    assert backward.bytes <= backward_limit * least_backward


def test_products_are_at_most_2_5_times_those_of_visible_pairs_forward_and_3_9_times_backward(long_sequence):
    _, forward, _, backward, _ = long_sequence
    visible = 512 * 65
    assert forward.dot_flops <= 2.5 * (2 * 2 * 64 * visible)
    assert backward.dot_flops <= 3.9 * (5 * 2 * 64 * visible)


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
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused projection"])
@pytest.mark.parametrize("family", ["interpreter", *SEPARATE_FAMILIES])
def test_no_program_leaves_its_tensors_or_meets_another(family, settings, fused, monkeypatch):
    monkeypatch.setattr(launch, "architecture_family", lambda device: family)
    forward, _, backward, _ = count(**{"window": WindowSpec()} | settings, fused=fused)
    for traffic in (forward, backward):
        assert not traffic.raced and not traffic.atomics
