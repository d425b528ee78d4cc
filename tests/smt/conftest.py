"""Models of these tests have gates of their own for every head, and read slots out; fresh ones are all the same, and do not.

Pictures are blank, as most tests want their files alone, but for tests that use ``drawn``.
"""

import pytest
import torch

from smt.model.decoder import Decoder
from smt.model.layers import GATE_RATE

initialise = Decoder.initialise


def initialise_and_open(decoder: Decoder) -> None:
    initialise(decoder)
    generator = torch.Generator().manual_seed(0)
    for block in decoder.blocks:
        if hasattr(block.attention, "slot_gate"):
            gate = block.attention.slot_gate.data
            gate.copy_((0.5 + torch.rand(gate.shape, generator=generator)) / GATE_RATE)
    if decoder.slot_readout is not None:
        weight = decoder.slot_readout.weight.data
        weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)


@pytest.fixture(scope="session", autouse=True)
def open_memory():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "initialise", initialise_and_open)
        yield


@pytest.fixture
def fresh_gates(monkeypatch):
    """As the product has them."""
    monkeypatch.setattr(Decoder, "initialise", initialise)


@pytest.fixture
def drawn():
    """For tests of pictures, which are drawn as the product does. What fixtures of a module make is, in any case."""


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.draw", lambda figure, renderer: None)
