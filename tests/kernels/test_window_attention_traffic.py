"""Window attention asks memory and matrix units for little more than it must, and for nothing that is not its own.

The whole window of 65 has budgets of its own (``test_kernel_budgets.py``); here are tails, shared heads and other windows.
"""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]


def count(direction: str, window: int, n_queries: int, heads: int = 2, kv_heads: int = 2, head_dim: int = 64, **named: bool):
    from smt_kernels.testing import audit, cases

    sizes = {"window": window, "n_queries": n_queries, "heads": heads, "kv_heads": kv_heads}
    return audit.count(cases.window_attention(direction, head_dim, **sizes, **named))


@pytest.mark.parametrize(("direction", "budget"), [("forward", 1.1), ("backward", 2)], ids=["forward", "backward"])
def test_query_heads_that_share_keys_read_them_once(direction, budget):
    assert count(direction, 65, 16, heads=4, kv_heads=1).bytes_ratio <= budget


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("n_queries", [50, 16], ids="T{}".format)
def test_a_tail_of_the_window_of_65_multiplies_at_most_three_times_what_is_visible(n_queries, direction):
    assert count(direction, 65, n_queries).flops_ratio <= 3


@pytest.mark.parametrize(
    "sizes",
    [(65, 65), (65, 16), (50, 50), (66, 65), (128, 1), (127, 127, 2, 1, 40), (65, 65, 1, 1, 256)],
    ids=lambda sizes: "-".join(f"{letter}{size}" for letter, size in zip(["W", "T", "H", "K", "D"], sizes, strict=False)),
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_program_leaves_its_tensors_or_meets_another(direction, sizes):
    traffic = count(direction, *sizes, fused=True).traffic  # views of one projection, of which the others are not their own
    assert not traffic.raced and not traffic.atomics
    assert len(traffic.launches) == 1
