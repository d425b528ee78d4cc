"""Models of these tests have gates of their own for every head; fresh ones are all the same."""

import pytest
import torch

from smt.decoder import Decoder

initialise = Decoder.initialise


def initialise_and_set_gates(decoder: Decoder) -> None:
    initialise(decoder)
    generator = torch.Generator().manual_seed(0)
    for block in decoder.blocks:
        if hasattr(block.attention, "slot_gate"):
            gate = block.attention.slot_gate.data
            gate.copy_(0.5 + torch.rand(gate.shape, generator=generator))


@pytest.fixture(scope="session", autouse=True)
def various_gates():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "initialise", initialise_and_set_gates)
        yield


@pytest.fixture
def fresh_gates(monkeypatch):
    """As the product has them."""
    monkeypatch.setattr(Decoder, "initialise", initialise)
