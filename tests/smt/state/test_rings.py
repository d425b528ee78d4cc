"""Rings hold entry e at e % size, whatever rows have come to."""

import pytest
import torch

from smt.state.rings import ends, from_ring, last_entries, take, to_ring


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
    newest = last_entries(values, ends(first, stops, values.device), size)
    ring = to_ring(newest, torch.tensor(stops[:1] if len(set(stops)) == 1 else stops))
    assert torch.equal(ring, naive(values, first, stops, size))
    layers = to_ring(torch.stack([newest, -newest]), torch.tensor(stops), dim=2)
    assert torch.equal(layers, torch.stack([ring, -ring]))
    for row, (stop, length) in enumerate(zip(stops, lengths, strict=True)):
        count, stop = min(length, size), torch.tensor([stop])
        newest = values[row : row + 1, length - count : length]
        assert torch.equal(from_ring(ring[row : row + 1], stop, count), newest)
        assert torch.equal(from_ring(ring, stop, count, rows=torch.tensor([row])), newest)
        of_layers = from_ring(layers[:, row : row + 1], stop, count, dim=2)
        assert torch.equal(of_layers, torch.stack([newest, -newest]))


def test_a_ring_of_no_entries_stays_empty():
    ring = to_ring(last_entries(torch.randn(2, 5, 3), 5, 0), torch.tensor([5]))
    assert ring.shape == (2, 0, 3) and from_ring(ring, torch.tensor([5]), 0).shape == (2, 0, 3)
    assert from_ring(ring, torch.tensor([5, 5]), 0, rows=torch.tensor([0, 1])).shape == (2, 0, 3)


def test_positions_outside_give_zeros():
    values = torch.arange(1, 7).reshape(2, 3)
    assert take(values, torch.tensor([[-1, 0, 2, 3]])).tolist() == [[0, 1, 3, 0], [0, 4, 6, 0]]
    assert take(values, torch.tensor([[2, 5], [-3, 1]])).tolist() == [[3, 0], [0, 5]]
    assert take(values[:, :0], torch.tensor([[0, 1]])).tolist() == [[0, 0], [0, 0]]
