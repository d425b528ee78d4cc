"""Attention pooling asks memory for little more than its two launches must, and for nothing that is not its own.

u depends on the mean of all entries, so that without the matrix products in a kernel both launches of a direction must read
them. Against one launch, which nobody has written, sequences have budgets in ``test_kernel_budgets.py``.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]


def count(case):
    from smt_kernels.testing import audit

    return audit.count(case)


@pytest.fixture(scope="module")
def cases():
    from smt_kernels.testing import cases

    return cases


@pytest.mark.parametrize("width", [256, 768], ids="d{}".format)
@pytest.mark.parametrize("with_slots", [True, False], ids=["with slots", "tokens only"])
@pytest.mark.parametrize("n_writes", [8, 40], ids=["one group", "a long call"])
def test_each_launch_forward_reads_the_entries_little_more_than_once(cases, n_writes, with_slots, width):
    case = cases.attention_pool_sequence("forward", width, n_writes=n_writes, with_slots=with_slots)
    counted = count(case)
    inputs = case.call.arguments["inputs"]
    entries = inputs.tokens.nbytes + (inputs.slots.nbytes if with_slots else 0)
    assert counted.traffic.bytes <= 1.25 * (counted.least_bytes + entries)


@pytest.mark.parametrize("with_slots", [True, False], ids=["with slots", "tokens only"])
@pytest.mark.parametrize("n_writes", [8, 40], ids=["one group", "a long call"])
def test_each_launch_backward_reads_little_more_than_it_must(cases, n_writes, with_slots):
    case = cases.attention_pool_sequence("backward", 256, n_writes=n_writes, with_slots=with_slots)
    inputs, kept = case.call.arguments["inputs"], case.call.arguments["kept"]
    entries = inputs.tokens.nbytes + (inputs.slots.nbytes if with_slots else 0)
    # Both launches read dpooled, weights and mask; one writes dweights, which the other reads; du and dmean are a u each.
    twice = 3 * kept.u.nbytes + 3 * kept.weights.nbytes + inputs.dropout.nbytes
    counted = count(case)
    assert counted.traffic.bytes <= 1.4 * (counted.least_bytes + entries + twice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_single_windows_are_read_once_by_each_launch(cases, dtype):
    case = cases.attention_pool("forward", 256, dtype, "cpu")
    counted = count(case)
    inputs = case.call.arguments["inputs"]
    again = inputs.tokens.nbytes + inputs.exists.nbytes
    assert counted.traffic.bytes <= 1.1 * (counted.least_bytes + again)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_programs_of_single_windows_read_their_entries_and_nothing_else(cases, direction, monkeypatch):
    """On a GPU, where few windows are pooled: the strips of one window share nothing, and meet nowhere."""
    from smt_kernels.attention_pool import kernels

    monkeypatch.setattr(kernels, "windows_of_strip", lambda *_: 1)
    n_writes, width = 9, 24  # of two groups
    case = cases.attention_pool_sequence(direction, width, n_writes=n_writes)
    traffic, inputs = count(case).traffic, case.call.arguments["inputs"]
    entry = width * inputs.tokens.itemsize
    for name, size, n_held in (("tokens", 50, inputs.tokens.shape[1]), ("slots", 15, inputs.slots.shape[1])):
        of_windows = n_writes * size * entry
        assert traffic.read[name] == (2 * of_windows if direction == "forward" else of_windows + n_held * entry)
    assert not traffic.raced and not traffic.atomics


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("n_writes", "with_slots", "width", "dtype", "batch"),
    [
        (1, True, 24, torch.float32, 2),
        (19, False, 40, torch.float32, 1),
        (3, True, 300, torch.float32, 1),
        (2, False, 1100, torch.bfloat16, 1),
    ],
    ids=["one write", "two strips of tokens", "two chunks of fp32", "chunks of bf16 tokens"],
)
def test_no_program_leaves_its_tensors_or_meets_another(cases, n_writes, with_slots, width, dtype, batch, direction):
    sizes = {"n_writes": n_writes, "with_slots": with_slots, "batch": batch}
    traffic = count(cases.attention_pool_sequence(direction, width, dtype, **sizes)).traffic
    assert not traffic.raced and not traffic.atomics
    assert len(traffic.launches) == 2
