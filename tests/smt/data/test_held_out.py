"""What a model is measured on: the first so many held-out documents, with those of their tokens that the loss counts."""

import numpy as np
import pytest
import torch

from smt.data.held_out import HeldOut
from smt_kernels.linear_cross_entropy import IGNORE_INDEX


class Split(list):
    """Documents of tokens, which of them are targets, and the bytes that these spell."""

    n_bytes = (100, 50, 7)

    def __init__(self, counted):
        super().__init__(np.arange(1, length + 1, dtype=np.uint16) for length in (30, 17, 9))
        self.counted = [np.arange(len(document)) % 5 == 2 for document in self] if counted else None


def targets(held_out):
    """Every target of a walk, in any order."""
    batches = list(held_out.walk(batch_size=2, length=8))
    return sorted(token for batch in batches for token in batch.targets[batch.targets != IGNORE_INDEX].tolist())


@pytest.mark.parametrize("counted", [False, True])
def test_pieces_have_the_targets_of_the_whole(counted):
    split = Split(counted)
    held_out = HeldOut.of(split, 2)
    expected = sorted(
        int(token)
        for index, document in enumerate(split[:2])
        for position, token in enumerate(document)
        if position > 0 and (not counted or split.counted[index][position])
    )
    assert targets(held_out) == targets(held_out.pieces(8)) == targets(held_out.pieces(5)) == expected
    assert held_out.n_targets == held_out.pieces(8).n_targets == held_out.pieces(3).n_targets == len(expected)
    assert held_out.n_steps == 29 + 16 and held_out.n_bytes == held_out.pieces(8).n_bytes == 150


def test_nothing_is_carried_into_a_piece():
    held_out = HeldOut.of(Split(True))
    assert len(held_out.documents) == 3 and held_out.n_bytes == 157
    pieces = held_out.pieces(8)
    assert [len(piece) for piece in pieces.documents] == [9, 9, 9, 6, 9, 9, 9]
    assert all(len(flags) == len(piece) for flags, piece in zip(pieces.counted, pieces.documents, strict=True))
    assert all(bool(batch.reset.all()) for batch in pieces.walk(batch_size=7, length=8))
    assert all(torch.equal(batch.positions, torch.zeros_like(batch.positions)) for batch in pieces.walk(batch_size=1, length=8))
