"""Rings hold entry e at e % size, whatever rows have come to."""

import pytest
import torch

from smt.state.rings import from_ring, last_entries, take, to_ring


def naive(values, first, stops, size):
    """Every row's ring after its entries before its stop, one entry after the other."""
    ring = torch.zeros(len(stops), size, *values.shape[2:], dtype=values.dtype)
    for row, stop in enumerate(stops):
        for entry in range(first, stop):
            ring[row, entry % size] = values[row, entry - first]
    return ring


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("first", [-7, 0, 5])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (1, 1, 1), (9, 2, 5), (0, 0, 0)], ids=str)
def test_rings_equal_writing_one_entry_after_the_other(size, first, lengths):
    values = torch.randn(3, 9, 2)
    stops = [first + length for length in lengths]
    ring = to_ring(values, first, stops, size)
    assert torch.equal(ring, naive(values, first, stops, size))
    for row, (stop, length) in enumerate(zip(stops, lengths, strict=True)):
        count = min(length, size)
        newest = values[row : row + 1, length - count : length]
        assert torch.equal(from_ring(ring[row : row + 1], stop, count), newest)
        assert torch.equal(last_entries(ring, torch.tensor([row]), torch.tensor([stop]), count), newest)


def test_a_ring_of_no_entries_stays_empty():
    values = torch.randn(2, 5, 3)
    ring = to_ring(values, 0, [5, 5], 0)
    assert ring.shape == (2, 0, 3) and from_ring(ring, 5, 0).shape == (2, 0, 3)
    assert last_entries(ring, torch.tensor([0, 1]), torch.tensor([5, 5]), 0).shape == (2, 0, 3)


def test_positions_outside_give_zeros():
    values = torch.arange(1, 7).reshape(2, 3)
    assert take(values, torch.tensor([[-1, 0, 2, 3]])).tolist() == [[0, 1, 3, 0], [0, 4, 6, 0]]
    assert take(values, torch.tensor([[2, 5], [-3, 1]])).tolist() == [[3, 0], [0, 5]]
    assert take(values[:, :0], torch.tensor([[0, 1]])).tolist() == [[0, 0], [0, 0]]
